// How long ONNX files take in WebAssembly, one thread, run in turn as `ptq4vit bench` runs them natively:
//   node measure.mjs FLOAT.onnx OTHER.onnx ... [--rounds 20]
// Prints one row of a Markdown table per file: median milliseconds, and how many times less than the first file.
// onnxruntime-web is the same WebAssembly in node as in a page; node's V8 is Chromium's.

import { readFileSync } from "node:fs";
import { basename } from "node:path";
import { cpus } from "node:os";
import * as ort from "onnxruntime-web";

const given = process.argv.slice(2);
const at = given.indexOf("--rounds");
const rounds = at < 0 ? 20 : Number(given[at + 1]);
const paths = at < 0 ? given : given.filter((_, place) => place !== at && place !== at + 1);
if (!paths.length || !(rounds >= 1)) {
  console.error("usage: node measure.mjs FLOAT.onnx OTHER.onnx ... [--rounds 20]");
  process.exit(2);
}
ort.env.wasm.numThreads = 1;

const quantile = (values, share) => {
  const sorted = [...values].sort((a, b) => a - b);
  const place = share * (sorted.length - 1);
  const low = Math.floor(place);
  return sorted[low] + (place - low) * ((sorted[low + 1] ?? sorted[low]) - sorted[low]);
};

// The same numbers for every file: a float image between -1 and 1, or bytes.
const feedOf = (session) => Object.fromEntries(session.inputMetadata.map(({ name, type, shape }) => {
  const dims = shape.map((size) => (typeof size === "number" ? size : 1));
  const count = dims.reduce((a, b) => a * b, 1);
  const values = type === "uint8" ? new Uint8Array(count) : new Float32Array(count);
  let state = 1;
  for (let i = 0; i < count; i += 1) {
    state = (state * 1103515245 + 12345) % 2147483648;
    values[i] = type === "uint8" ? state % 256 : state / 1073741824 - 1;
  }
  return [name, new ort.Tensor(type, values, dims)];
}));

const files = [];
for (const path of paths) {
  const session = await ort.InferenceSession.create(readFileSync(path), { executionProviders: ["wasm"] });
  files.push({ path, session, feed: feedOf(session), milliseconds: [] });
}
for (let round = -1; round < rounds; round += 1) {
  for (const { session, feed, milliseconds } of files) {
    const started = performance.now();
    await session.run(feed);
    if (round >= 0) milliseconds.push(performance.now() - started);
  }
}
console.log(`onnxruntime-web ${ort.env.versions.web}, node ${process.version}, one thread, ${cpus()[0].model}, ${rounds} rounds`);
console.log("| file | ms | times less than the first (quartiles) |\n|---|---|---|");
for (const { path, milliseconds } of files) {
  const ratios = milliseconds.map((own, round) => files[0].milliseconds[round] / own);
  const [low, middle, high] = [0.25, 0.5, 0.75].map((share) => quantile(ratios, share).toFixed(2));
  const gain = path === files[0].path ? "" : `${middle} (${low} to ${high})`;
  console.log(`| ${basename(path)} | ${quantile(milliseconds, 0.5).toFixed(1)} | ${gain} |`);
}
