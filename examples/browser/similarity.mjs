// node similarity.mjs FOLDER DTYPE TEXT TEXT: cosine of two texts by a folder that `hf-adacomp export` wrote (DTYPE is
// fp32, q8 for --quantize int8, q4 for int4). Before: npm install --ignore-scripts
import { env, pipeline } from "@huggingface/transformers";
import { basename, dirname } from "node:path";

const [folder, dtype, ...texts] = process.argv.slice(2);
Object.assign(env, { allowRemoteModels: false, localModelPath: dirname(folder) });
const embed = await pipeline("feature-extraction", basename(folder), { dtype });
const [a, b] = (await embed(texts, { pooling: "mean", normalize: true })).tolist();
console.log(a.reduce((sum, x, i) => sum + x * b[i], 0));
