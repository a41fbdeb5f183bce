// Run an ONNX file in onnxruntime-web, WebAssembly on one thread, in node:
//     node web_runtime.mjs FILE FOLDER [NAME=DATA ...]
// FOLDER: where `npm install onnxruntime-web` was run, or a folder in it. NAME=DATA: a data file of the model, by the
// name that the model calls it. First it prints a line that says the versions; then, for each line of JSON that it
// reads, {"inputs": [{name, type, dims, file}], "folder"}, it runs the file once on these bytes, writes every output
// into the folder, and prints {"outputs": [{name, type, dims, file}]}.

import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join, resolve } from "node:path";
import { createInterface } from "node:readline";

const [path, folder, ...data] = process.argv.slice(2);
const ort = createRequire(join(resolve(folder), "package.json"))("onnxruntime-web");
const ARRAYS = {
  float32: Float32Array, float64: Float64Array, uint8: Uint8Array, int8: Int8Array, uint16: Uint16Array,
  int16: Int16Array, int32: Int32Array, uint32: Uint32Array, int64: BigInt64Array, uint64: BigUint64Array,
  bool: Uint8Array,
};

ort.env.wasm.numThreads = 1;
ort.env.logLevel = "fatal"; // what it raises says the same
const externalData = data.map((entry) => {
  const at = entry.indexOf("=");
  return { path: entry.slice(0, at), data: readFileSync(entry.slice(at + 1)) };
});
const options = { executionProviders: ["wasm"], externalData };
const session = await ort.InferenceSession.create(readFileSync(path), options);
console.log(JSON.stringify({ web: ort.env.versions.web, node: process.version }));

for await (const line of createInterface({ input: process.stdin })) {
  const { inputs, folder: out } = JSON.parse(line);
  const feed = Object.fromEntries(inputs.map(({ name, type, dims, file }) => {
    const bytes = readFileSync(file);
    const whole = bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength);
    return [name, new ort.Tensor(type, new ARRAYS[type](whole), dims)];
  }));
  const found = await session.run(feed);
  const outputs = session.outputNames.map((name, number) => {
    const { type, dims, data: values } = found[name];
    const file = join(out, `output${number}`);
    writeFileSync(file, Buffer.from(values.buffer, values.byteOffset, values.byteLength));
    return { name, type, dims, file };
  });
  console.log(JSON.stringify({ outputs }));
}
