// Golden transcripts as a server: it says what it said, when it is told what it was told.
import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";
import { createServer } from "node:http";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { WebSocketServer } from "ws";

const folder = join(dirname(fileURLToPath(import.meta.url)), "..", "..", "golden");

/** All transcripts: {head, lines}. */
export function transcripts() {
  return readdirSync(folder)
    .filter((name) => name.endsWith(".jsonl"))
    .map((name) => {
      const [head, ...lines] = readFileSync(join(folder, name), "utf8").trimEnd().split("\n").map((line) => JSON.parse(line));
      return { head, lines };
    });
}

/** Its url, what went wrong, and a function that ends it. */
export async function replaying(lines) {
  return lines[0].request ? replayingHttp(lines) : replayingSocket(lines);
}

async function replayingHttp(lines) {
  const left = [...lines];
  const wrong = [];
  const server = createServer(async (request, response) => {
    let text = "";
    for await (const part of request) text += part;
    const got = { method: request.method, path: request.url, body: text ? JSON.parse(text) : null };
    const wanted = left.shift()?.request;
    const said = left.shift()?.response;
    note(wrong, got, wanted);
    response.writeHead(said?.status ?? 500, said?.headers ?? {});
    if (said?.events) {
      for (const event of said.events) response.write(`data: ${typeof event === "string" ? event : JSON.stringify(event)}\n\n`);
      response.end();
    } else response.end(JSON.stringify(said?.body ?? {}));
  });
  await new Promise((listening) => server.listen(0, "127.0.0.1", listening));
  return { url: `http://127.0.0.1:${server.address().port}`, wrong, close: () => server.close() };
}

async function replayingSocket(lines) {
  const wrong = [];
  const server = new WebSocketServer({ port: 0, host: "127.0.0.1" });
  server.on("connection", (socket) => {
    const names = new Map(); // the client's ids by the transcript's
    let at = 0;
    const speak = () => {
      for (; at < lines.length && lines[at].server; at++) socket.send(JSON.stringify(named(lines[at].server, names)));
      if (at === lines.length && lines[at - 1].server?.type === "auth_failed") socket.close(1008);
    };
    socket.on("message", (text) => {
      const got = JSON.parse(String(text));
      const wanted = lines[at++]?.client;
      if (wanted?.id !== undefined) names.set(wanted.id, got.id);
      note(wrong, got, named(wanted, names));
      speak();
    });
    speak();
  });
  await new Promise((listening) => server.on("listening", listening));
  return { url: `ws://127.0.0.1:${server.address().port}/ws`, wrong, close: () => server.close() };
}

/** A frame of the transcript with the ids of this run. */
function named(frame, names) {
  if (typeof frame !== "object" || frame === null || Array.isArray(frame)) return frame;
  return Object.fromEntries(
    Object.entries(frame).map(([key, value]) => [key, key === "id" ? (names.get(value) ?? value) : named(value, names)]),
  );
}

function note(wrong, got, wanted) {
  try {
    assert.deepEqual(got, wanted);
  } catch {
    wrong.push(`told ${JSON.stringify(got)}, the transcript has ${JSON.stringify(wanted)}`);
  }
}
