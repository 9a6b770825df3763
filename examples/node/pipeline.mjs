// A pipeline of two models, registered on the running server and run by name: told as it goes, and over a WebSocket.
import assert from "node:assert/strict";
import { Client, WebSocketClient } from "@dfastllm/client";
import WebSocket from "ws";

const options = { url: process.env.DFASTLLM_URL, apiKey: process.env.DFASTLLM_API_KEY };
const pipeline = {
  name: "second-opinion",
  steps: [
    { id: "first", model: "demo-ar", input: "{{ input }}", options: { max_tokens: 16, temperature: 0 } },
    {
      id: "second",
      model: "demo-diffusion",
      messages: [{ role: "user", content: "{{ input }}" }],
      options: { max_tokens: 16 },
      when: "first | length > 0",
    },
  ],
  output: "{{ second or first }}",
};

const client = new Client(options);
await client.registerPipeline(pipeline);
const stream = client.streamPipeline("second-opinion", "What is 12 + 30?");
for await (const event of stream) console.log(event.step, event.type, event.text && JSON.stringify(event.text));
const { result } = stream;
console.log("output:", result.output, `(${result.tokensGenerated} tokens)`);

const socket = new WebSocketClient({ ...options, WebSocket });
const again = await socket.executePipeline("second-opinion", "What is 12 + 30?");
socket.disconnect();

assert.equal(again.output, result.output);
assert.deepEqual(result.steps.map((step) => step.status), ["done", "done"]);
assert.match(result.output, /42/);
