// node generate.mjs FOLDER DTYPE TEXT: a text as a language model continues it, by a folder that `hf-adacomp export` wrote
// (DTYPE is fp32, q8 for --quantize int8, q4 for int4). Before: npm install --ignore-scripts
import { env, pipeline } from "@huggingface/transformers";
import { basename, dirname } from "node:path";

const [folder, dtype, text] = process.argv.slice(2);
Object.assign(env, { allowRemoteModels: false, localModelPath: dirname(folder) });
const generate = await pipeline("text-generation", basename(folder), { dtype });
const [{ generated_text }] = await generate(text, { max_new_tokens: 20, do_sample: false, add_special_tokens: true });
console.log(generated_text);
