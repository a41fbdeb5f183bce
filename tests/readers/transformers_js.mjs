// Open a folder of export_huggingface with transformers.js and classify pictures; print the answers as JSON.
//     node transformers_js.mjs FOLDER PICTURE...

import { basename, dirname, resolve } from "node:path";
import { AutoImageProcessor, AutoModel, AutoModelForImageClassification, env, RawImage } from "@huggingface/transformers";

const [folder, ...pictures] = process.argv.slice(2).map((path) => resolve(path));
env.localModelPath = dirname(folder);
env.allowRemoteModels = false;
const name = basename(folder), options = { dtype: "q8", device: "cpu" };
const processor = await AutoImageProcessor.from_pretrained(name);
const classes = process.env.TASK !== "features";
const model = await (classes ? AutoModelForImageClassification : AutoModel).from_pretrained(name, options);
const answers = [];
for (const picture of pictures) {
  const inputs = await processor(await RawImage.read(picture));
  const output = await model(inputs);
  const tensor = classes ? output.logits : output.last_hidden_state;
  const values = Array.from(tensor.data), best = values.indexOf(Math.max(...values));
  answers.push({ dims: tensor.dims, class: best, label: model.config.id2label?.[best] ?? null, values: values.slice(0, 5) });
}
console.log(JSON.stringify(answers));
