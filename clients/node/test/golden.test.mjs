// The client says what the Python client said, and makes the same of what the server says.
import assert from "node:assert/strict";
import { test } from "node:test";
import WebSocket from "ws";
import { Client, ClientError, GenerationResult, HealthStatus, WebSocketClient } from "../dist/esm/index.js";
import { replaying, transcripts } from "./replay.mjs";

const found = transcripts();
test("there are transcripts", () => assert.ok(found.length > 10));

for (const { head, lines } of found) {
  test(head.name, { timeout: 20_000 }, async () => {
    const server = await replaying(lines);
    const options = { url: server.url, apiKey: head.api_key ?? undefined, backoff: { attempts: 0 } };
    const client = head.transport === "http" ? new Client(options) : new WebSocketClient({ ...options, WebSocket });
    try {
      const outcomes = [];
      if (head.at_once) outcomes.push(...(await Promise.all(head.calls.map((call) => outcome(client, call)))));
      else for (const call of head.calls) outcomes.push(await outcome(client, call));
      assert.deepEqual(server.wrong, []);
      assert.deepEqual(outcomes, head.outcomes);
    } finally {
      if (client instanceof WebSocketClient) client.disconnect();
      server.close();
    }
  });
}

/** A call's result or error, in the names of the transcripts. */
async function outcome(client, call) {
  try {
    const made = client[call.method.replace(/_(\w)/g, (_, letter) => letter.toUpperCase())](...call.args);
    return Symbol.asyncIterator in made ? await streamed(client, made, call) : shown(await made);
  } catch (error) {
    if (!(error instanceof ClientError)) throw error;
    const { code, status, param, retryAfter } = error;
    return {
      error: error.name,
      code,
      ...(status !== undefined && { status }),
      ...(param !== undefined && { param }),
      ...(retryAfter !== undefined && { retry_after: retryAfter }),
    };
  }
}

async function streamed(client, stream, call) {
  const pieces = [];
  for await (const piece of stream) {
    if (piece.step !== undefined) pieces.push([piece.type, piece.step, piece.text]);
    else {
      const row = [piece.text, piece.index, piece.tokens, piece.isFinal];
      pieces.push(piece.canvas.length ? [...row, piece.canvas.map((event) => event.type)] : row);
    }
    if (call.cancel && pieces.length === 1) assert.ok(await client.cancel(stream.requestId));
  }
  return { pieces, ...shown(stream.result) };
}

function shown(result) {
  if (result instanceof GenerationResult) {
    return {
      text: result.text,
      tokens_generated: result.tokens_generated,
      prompt_tokens: result.prompt_tokens,
      finish_reason: result.finishReason,
      model: result.model,
    };
  }
  if (result instanceof HealthStatus) return { status: result.status, models: result.models };
  if (Array.isArray(result)) return { ids: result.map((one) => one.id) };
  if (result?.functions) return { names: result.functions.map((one) => [one.name, one.streaming]) };
  if (result?.output !== undefined) return { output: result.output, tokens_generated: result.tokensGenerated };
  return result;
}
