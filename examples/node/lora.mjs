// A LoRA adapter, loaded while the server runs: chosen by a call, beside calls without it, and unloaded again.
// The server runs with --enable-lora --lora-root DIR; DFASTLLM_LORA is a PEFT directory of demo-ar below it (docs/lora.md).
import assert from "node:assert/strict";
import { Client, NotFoundError } from "@dfastllm/client";

if (!process.env.DFASTLLM_LORA) {
  console.error("DFASTLLM_LORA must name a PEFT directory of demo-ar below the server's --lora-root (README.md).");
  process.exit(1);
}
const client = new Client({ url: process.env.DFASTLLM_URL, apiKey: process.env.DFASTLLM_API_KEY, model: "demo-ar" });
const prompt = { prompt: "What is 12 + 30?", maxTokens: 24, temperature: 0 };

const card = await client.loadAdapter("example", process.env.DFASTLLM_LORA, { model: "demo-ar", replace: true });
console.log("loaded", card.id, "of", card.parent);
const base = await client.generate(prompt);
const [adapted, byName] = await Promise.all([
  client.generate({ ...prompt, lora: "example" }),
  client.generate({ ...prompt, model: "demo-ar:example" }),
]);
console.log("without:", JSON.stringify(base.text));
console.log("with:   ", JSON.stringify(adapted.text));
assert.equal(adapted.text, byName.text);
assert.notEqual(adapted.text, base.text);
assert.equal((await client.generate(prompt)).text, base.text, "the base model is as it was");

await client.unloadAdapter("example", { model: "demo-ar" });
await assert.rejects(client.generate({ ...prompt, lora: "example" }), (error) => {
  console.log("unloaded:", error.message);
  return error instanceof NotFoundError;
});
