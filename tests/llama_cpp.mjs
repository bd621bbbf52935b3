// node llama_cpp.mjs NODE_MODULES FILE.gguf ASKED.json: what a real llama.cpp (the package node-llama-cpp) makes of lists of
// tokens and texts. ASKED holds objects with `ids` (log-probability of each but the first), `prompt` and `tokens` (greedy
// continuation) or `text` (its tokens).
import {readFileSync} from "node:fs";
import {resolve} from "node:path";
import {pathToFileURL} from "node:url";

const [modules, file, given] = process.argv.slice(2);
const {getLlama} = await import(pathToFileURL(resolve(modules, "node-llama-cpp/dist/index.js")));
const llama = await getLlama({gpu: false, build: "never", maxThreads: 1, logLevel: "error"});
const model = await llama.loadModel({modelPath: file});
const context = await model.createContext({contextSize: 512, threads: 1});
const sequence = context.getSequence();
const whole = {generateNext: {probabilities: true, options: {temperature: 1, topK: 0, topP: 1, minP: 0}}};
const found = [];
for (const one of JSON.parse(readFileSync(given, "utf8"))) {
  const row = {};
  if (one.text !== undefined) row.ids = Array.from(model.tokenize(one.text, true));
  if (one.ids !== undefined) {
    await sequence.clearHistory();
    const read = await sequence.controlledEvaluate(one.ids.map((token) => [token, whole]));
    row.logprobs = one.ids.slice(1).map((token, i) => Math.log(read[i].next.probabilities.get(token)));
  }
  if (one.prompt !== undefined) {
    await sequence.clearHistory();
    row.said = [];
    for await (const token of sequence.evaluate(one.prompt, {temperature: 0})) {
      if (row.said.length >= one.tokens || model.isEogToken(token)) break;
      row.said.push(token);
    }
  }
  found.push(row);
}
console.log(JSON.stringify(found));
await llama.dispose();
