// What a server has: its models and their kinds, each asked the same; and what it does not have.
import assert from "node:assert/strict";
import { Client, NotFoundError } from "@dfastllm/client";

const client = new Client({ url: process.env.DFASTLLM_URL, apiKey: process.env.DFASTLLM_API_KEY });
const question = [{ role: "user", content: "What is 12 + 30?" }];
const answers = {};

for (const model of await client.models()) {
  if (model.parent) {
    console.log(`${model.id}: a LoRA adapter of ${model.parent}`);
    continue;
  }
  console.log(`${model.id}: ${model.kind}, ${model.family}, ${model.max_model_len} tokens`);
  if (["demo-ar", "demo-diffusion"].includes(model.id)) {
    answers[model.kind] = (await client.chat(question, { model: model.id, maxTokens: 32 })).text;
  }
}
console.log(answers);
await assert.rejects(client.request("GET", "/v1/models/demo-nothing"), (error) => {
  console.log(error.message);
  return error instanceof NotFoundError;
});
assert.match(answers.ar, /42/);
assert.match(answers.diffusion, /42/);
