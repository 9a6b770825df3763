// A question, its answer, and what it took; over HTTP, and the same over a WebSocket.
// DFASTLLM_URL and DFASTLLM_API_KEY say where and as whom (see examples/README.md).
import assert from "node:assert/strict";
import { Client, WebSocketClient } from "@dfastllm/client";
import WebSocket from "ws"; // Node 22 and browsers have their own

const url = process.env.DFASTLLM_URL ?? "http://127.0.0.1:8000";
const apiKey = process.env.DFASTLLM_API_KEY;
const model = "demo-diffusion";
const question = [{ role: "user", content: "What is 12 + 30?" }];

const client = new Client({ url, apiKey, model });
console.log("server:", (await client.health()).status);
const result = await client.chat(question, { maxTokens: 32 });
console.log("answer:", result.text);
console.log(`${result.promptTokens} tokens asked, ${result.tokensGenerated} answered in ${Math.round(result.timeMs)} ms`);

const socket = new WebSocketClient({ url, apiKey, model, WebSocket });
await socket.connect();
console.log("connected as", socket.getTenantId());
const again = await socket.chat(question, { maxTokens: 32 });
socket.disconnect();

assert.match(result.text, /42/);
assert.equal(again.text, result.text);
