// Classify a dropped picture with the float and the int8 file, in WebAssembly, one thread.
// `model.onnx` (int8) and `float.onnx` beside this page are opened if they are there; others can be chosen.

import * as ort from "onnxruntime-web";
import { bytes, fit, normalized } from "./images.js";
import { readMetadata } from "./metadata.js";

const RUNS = 5, SHOWN = 5;
const models = {}; // "float" and "int8" -> {session, metadata}
const $ = (query) => document.querySelector(query);
const say = (text, state = "working") => {
  $("#state").textContent = text;
  document.body.dataset.state = state;
};
ort.env.wasm.numThreads = 1;

async function open(kind, name, buffer) {
  say(`opening ${name} ...`);
  const metadata = readMetadata(buffer);
  const session = await ort.InferenceSession.create(buffer, { executionProviders: ["wasm"], logSeverityLevel: 3 });
  models[kind] = { session, metadata };
  $(`#${kind} .name`).textContent = `${name}, ${(buffer.length / 1e6).toFixed(1)} MB`;
}

async function openBeside(kind, name) {
  const answer = await fetch(name);
  if (answer.ok) await open(kind, name, new Uint8Array(await answer.arrayBuffer()));
}

/** Return what a file records, or else what the other file does: a float file of another program says nothing. */
function recorded(key) {
  const found = [models.int8, models.float].find((model) => model?.metadata[key] !== undefined);
  return found && JSON.parse(found.metadata[key]);
}

/** Return the RGB pixels of a picture upright, as its EXIF orientation says, and without a colour profile's changes. */
async function decode(blob) {
  const bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  const { width, height, data } = context.getImageData(0, 0, bitmap.width, bitmap.height);
  return { width, height, data: data.filter((_, i) => i % 4 !== 3) };
}

/** Return the feed of a picture for a model: floats, or bytes where the file scales them itself. */
function feedOf(model, image, config) {
  const { name, shape } = model.session.inputMetadata[0];
  const layout = model.metadata["ptq4vit_fx.uint8_input"];
  const sizes = layout === "nhwc" ? [shape[1], shape[2]] : [shape[2], shape[3]];
  const fitted = fit(image, config, sizes);
  const dims = layout === "nhwc" ? [1, ...sizes, 3] : [1, 3, ...sizes];
  const tensor = layout
    ? new ort.Tensor("uint8", bytes(fitted, layout), dims)
    : new ort.Tensor("float32", normalized(fitted, config), dims);
  return { [name]: tensor };
}

function probabilities(logits) {
  const largest = Math.max(...logits), powers = Array.from(logits, (x) => Math.exp(x - largest));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((power, number) => [number, power / sum]).sort((a, b) => b[1] - a[1]);
}

function show(kind, milliseconds, ranked, labels) {
  const section = $(`#${kind}`);
  section.dataset.class = ranked[0][0];
  section.dataset.milliseconds = milliseconds;
  section.querySelector(".time").textContent = `${milliseconds.toFixed(1)} ms, the median of ${RUNS}`;
  const rows = ranked.slice(0, SHOWN).map(([number, share]) => {
    const row = document.createElement("tr");
    for (const text of [labels?.[number] ?? `class ${number}`, `${(100 * share).toFixed(1)} %`]) {
      row.insertCell().textContent = text;
    }
    return row;
  });
  section.querySelector("table").replaceChildren(...rows);
}

async function classify(blob) {
  const config = recorded("ptq4vit_fx.provenance")?.preprocessing, labels = recorded("ptq4vit_fx.labels");
  if (!config) throw new Error("no file records its preprocessing: write it with `ptq4vit quantize`");
  const image = await decode(blob);
  $("#picture").src = URL.createObjectURL(blob);
  say("computing ...");
  const times = {};
  const feeds = Object.entries(models).map(([kind, model]) => [kind, model, feedOf(model, image, config)]);
  const outputs = {};
  for (let run = 0; run <= RUNS; run++) { // in turn, the first run of each not counted
    for (const [kind, { session }, feed] of feeds) {
      const started = performance.now();
      outputs[kind] = await session.run(feed);
      if (run) (times[kind] ??= []).push(performance.now() - started);
      await new Promise((resolve) => setTimeout(resolve)); // let the page draw
    }
  }
  const median = (list) => list.toSorted((a, b) => a - b)[Math.floor(list.length / 2)];
  for (const [kind, { session }] of feeds) {
    show(kind, median(times[kind]), probabilities(outputs[kind][session.outputNames[0]].data), labels);
  }
  const ratio = times.float && times.int8 ? `int8 takes ${(median(times.float) / median(times.int8)).toFixed(2)} times less` : "";
  say(ratio || "choose the other file too", "done");
}

const guarded = (action) => async (event) => {
  try {
    await action(event);
  } catch (error) {
    say(`${error.message ?? error}`, "failed");
  }
};
const take = guarded(async (blob) => (Object.keys(models).length ? classify(blob) : say("choose a model first", "failed")));

$("#file").addEventListener("change", (event) => event.target.files[0] && take(event.target.files[0]));
for (const kind of ["float", "int8"]) {
  $(`#${kind} input`).addEventListener(
    "change",
    guarded(async (event) => {
      const file = event.target.files[0];
      await open(kind, file.name, new Uint8Array(await file.arrayBuffer()));
      say("drop a picture", "ready");
    }),
  );
}
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    $("#drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files[0]) take(event.dataTransfer.files[0]);
  });
}

guarded(async () => {
  await openBeside("int8", "model.onnx");
  await openBeside("float", "float.onnx");
  say(Object.keys(models).length ? "drop a picture" : "choose the two files, then drop a picture", "ready");
})();
