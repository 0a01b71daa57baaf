// node memory.mjs FOLDER DTYPE TEXT: bytes that a process had at most in memory which loads a folder that
// `hf-adacomp export` wrote and embeds one text, as similarity.mjs does. Linux.
import { env, pipeline } from "@huggingface/transformers";
import { readFileSync } from "node:fs";
import { basename, dirname } from "node:path";

const [folder, dtype, text] = process.argv.slice(2);
Object.assign(env, { allowRemoteModels: false, localModelPath: dirname(folder) });
const session_options = { intraOpNumThreads: 1 };
const embed = await pipeline("feature-extraction", basename(folder), { dtype, session_options });
await embed([text], { pooling: "mean", normalize: true });
console.log(1024 * Number(readFileSync("/proc/self/status", "ascii").match(/VmHWM:\s+(\d+)/)[1]));
