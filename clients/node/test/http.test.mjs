// What is sent again and what never is, AbortSignal, time limits, streams that break.
import assert from "node:assert/strict";
import { createServer } from "node:http";
import { test } from "node:test";
import {
  CancelledError,
  Client,
  ConnectionFailedError,
  ConnectionLostError,
  InvalidRequestError,
  NotFoundError,
  ProtocolError,
  RateLimitError,
  ServerError,
  TimeoutError,
} from "../dist/esm/index.js";

const WHOLE = {
  id: "cmpl-1",
  model: "m",
  choices: [{ index: 0, text: "42", finish_reason: "stop" }],
  usage: { prompt_tokens: 3, completion_tokens: 2, total_tokens: 5 },
  dfastllm: { total_seconds: 0.25 },
};
const backoff = { attempts: 2, firstMs: 0 };

const json = (status, body, headers = {}) => (_, response) => {
  response.writeHead(status, { "content-type": "application/json", ...headers });
  response.end(JSON.stringify(body));
};
const ok = json(200, WHOLE);
const refuses = (status, retryAfter, code = "c") =>
  json(status, { error: { message: "Not now.", type: "t", param: "p", code } }, retryAfter === undefined ? {} : { "retry-after": retryAfter });
const breaks = (request) => request.socket.destroy();
const event = (text, ids, finish = null) =>
  `data: ${JSON.stringify({ model: "m", choices: [{ index: 0, text, token_ids: ids, finish_reason: finish }] })}\n\n`;
const END = `data: ${JSON.stringify({ ...WHOLE, choices: [] })}\n\ndata: [DONE]\n\n`;

/** A stream of these parts; then its end, a broken connection, or nothing. */
const streams = (parts, end = "whole") => async (_, response) => {
  response.writeHead(200, { "content-type": "text/event-stream" });
  for (const part of parts) {
    response.write(part);
    await new Promise((written) => setTimeout(written, 2));
  }
  if (end === "whole") response.end();
  else if (end === "broken") response.destroy();
};

/** Runs `work` with a client whose requests get these answers, one each; and the requests that came. */
async function against(answers, work, options = {}) {
  const seen = [];
  const server = createServer(async (request, response) => {
    let text = "";
    for await (const part of request) text += part;
    seen.push({ url: request.url, headers: request.headers, body: text && JSON.parse(text), request });
    answers.shift()(request, response);
  });
  await new Promise((listening) => server.listen(0, "127.0.0.1", listening));
  try {
    await work(new Client({ url: `http://127.0.0.1:${server.address().port}/v1`, backoff, ...options }), seen);
  } finally {
    server.closeAllConnections();
    server.close();
  }
}

test("what was not run is sent again", async () => {
  for (const first of [refuses(429, "0"), refuses(503, "0")]) {
    await against([first, ok], async (client, seen) => {
      assert.equal(String(await client.generate("x")), "42");
      assert.equal(seen.length, 2);
    });
  }
});

test("what may have run is never sent again", async () => {
  const cases = [
    [breaks, ConnectionLostError],
    [refuses(500), ServerError],
    [refuses(504), TimeoutError],
    [refuses(503), ServerError], // says no time to come back: it may have run
    [refuses(429, "3600"), RateLimitError], // longer than anybody waits
    [refuses(400), InvalidRequestError],
    [refuses(404), NotFoundError],
  ];
  for (const [first, kind] of cases) {
    await against([first, ok], async (client, seen) => {
      await assert.rejects(client.generate("x"), (error) => error instanceof kind && error.retry_after === error.retryAfter);
      assert.equal(seen.length, 1);
    });
  }
});

test("what cannot be sent is refused before it is, and no NaN becomes a null", async () => {
  const circle = {};
  circle.self = circle;
  const cases = [
    [{}, "prompt"],
    [{ prompt: "x", messages: [] }, "prompt"],
    [{ prompt: "x", n: 2 }, "n"],
    [{ prompt: ["x", "y"] }, "prompt"],
    [{ prompt: "x", temperature: NaN }, "temperature"],
    [{ prompt: "x", topP: Infinity }, "top_p"],
    [{ prompt: "x", stop: () => "a" }, "stop"],
    [{ prompt: "x", threshold: 1n }, "threshold"],
    [{ prompt: "x", ruleOptions: circle }, undefined],
    [{ prompt: "x", timeout: "1" }, "timeout"],
    [{ prompt: "x", timeout: NaN }, "timeout"],
    [{ prompt: "x", timeout: 0 }, "timeout"],
    [5, "prompt"],
    [null, "prompt"],
    [[5, 6], "prompt"],
  ];
  for (const [bad, param] of cases) {
    await against([], async (client, seen) => {
      const refused = (error) => error instanceof InvalidRequestError && error.param === param && error.status === undefined;
      await assert.rejects(client.generate(bad), refused, String(param));
      await assert.rejects(async () => {
        for await (const _ of client.generateStream(bad));
      }, refused);
      assert.equal(seen.length, 0);
    });
  }
  await against([ok], async (client, seen) => {
    await client.generate({ prompt: [5, 6] });
    assert.deepEqual(seen[0].body.prompt, [5, 6]);
  });
});

test("addresses and time limits that cannot be", async () => {
  for (const url of ["", "127.0.0.1:8000", "ftp://x", "http://", "http://h:99999", "http://[::1", 5]) {
    assert.throws(() => new Client({ url }), InvalidRequestError, String(url));
  }
  for (const timeoutMs of [0, -1, NaN, Infinity, "5"]) assert.throws(() => new Client({ timeoutMs }), InvalidRequestError);
});

test("a time limit of more than 24 days is no limit of a millisecond", async () => {
  await against([ok, ok], async (client) => {
    assert.equal(String(await client.generate({ prompt: "x", timeout: 3e6 })), "42");
    await new Promise((later) => setTimeout(later, 5));
  });
  const slow = (_, response) => setTimeout(() => ok(_, response), 30);
  await against([slow], async (client) => assert.equal(String(await client.generate("x")), "42"), { timeoutMs: 2 ** 32 });
});

test("attempts end with the refusal, and no wait goes beyond the time limit", async () => {
  await against([refuses(429, "0"), refuses(429, "0"), refuses(429, "0"), ok], async (client, seen) => {
    await assert.rejects(client.generate("x"), { name: "RateLimitError", retryAfter: 0, param: "p", status: 429 });
    assert.equal(seen.length, 3);
  });
  const waits = async (client, seen) => {
    await assert.rejects(client.generate("x"), RateLimitError);
    assert.equal(seen.length, 1);
  };
  await against([refuses(429, "30"), ok], waits, { timeoutMs: 1000 });
});

test("a server that is not there was never asked", async () => {
  const server = createServer();
  await new Promise((listening) => server.listen(0, "127.0.0.1", listening));
  const { port } = server.address();
  await new Promise((closed) => server.close(closed));
  const client = new Client({ url: `http://127.0.0.1:${port}`, backoff: { attempts: 1, firstMs: 0 } });
  await assert.rejects(client.generate("x"), ConnectionFailedError);
});

test("reading calls are asked again, changing ones are not", async () => {
  await against([breaks, json(200, { data: [{ id: "m" }] })], async (client) => {
    assert.deepEqual(await client.models(), [{ id: "m" }]);
  });
  await against([breaks, ok], (client) => assert.rejects(client.loadAdapter("a", "/a"), ConnectionLostError));
});

test("a stream cut anywhere is the same", async () => {
  const whole = Buffer.from(`: a comment\n\n${event("4é", [1, 2])}${event("", [3])}${event("2", [4], "stop")}${END}`);
  for (const size of [9, whole.length]) {
    const parts = [];
    for (let at = 0; at < whole.length; at += size) parts.push(whole.subarray(at, at + size));
    await against([streams(parts)], async (client) => {
      const stream = client.generateStream("x");
      const pieces = [];
      for await (const piece of stream) pieces.push([piece.text, piece.index, piece.tokens, piece.is_final]);
      assert.deepEqual(pieces, [["4é", 0, 2, false], ["", 2, 1, false], ["2", 3, 1, true]]);
      assert.deepEqual([stream.result.text, stream.result.timeMs, stream.result.tokens_generated], ["4é2", 250, 2]);
    });
  }
});

test("a broken stream says what came, and is not sent again", async () => {
  for (const end of ["broken", "whole"]) {
    await against([streams([event("4", [7, 8])], end), ok], async (client, seen) => {
      const stream = client.generateStream("x");
      await assert.rejects(
        async () => {
          for await (const _ of stream);
        },
        (error) => {
          assert.ok(error instanceof ConnectionLostError, error);
          assert.deepEqual(error.received, { text: "4", tokens: 2, requestId: stream.requestId });
          return true;
        },
      );
      assert.equal(seen.length, 1);
    });
  }
});

test("an error in a stream is typed and says what came", async () => {
  const failed = `data: ${JSON.stringify({ error: { message: "So.", type: "server_error", code: "cancelled" } })}\n\n`;
  await against([streams([event("4", [7]), failed, "data: [DONE]\n\n"]), ok], async (client) => {
    const all = async () => {
      for await (const _ of client.generateStream("x"));
    };
    await assert.rejects(all, (error) => error instanceof CancelledError && error.received.text === "4");
  });
});

test("an AbortSignal ends a call and a stream, before and after they began", async () => {
  await against([], (client) => {
    const signal = AbortSignal.abort();
    return assert.rejects(client.generate({ prompt: "x", signal }), { name: "CancelledError", code: "aborted" });
  });
  await against([() => undefined], async (client, seen) => {
    const controller = new AbortController();
    setTimeout(() => controller.abort(), 50);
    await assert.rejects(client.generate({ prompt: "x", signal: controller.signal }), CancelledError);
    assert.ok(!("signal" in seen[0].body));
  });
  await against([streams([event("4", [7])], "open")], async (client, seen) => {
    const controller = new AbortController();
    const all = async () => {
      for await (const _ of client.generateStream({ prompt: "x", signal: controller.signal })) controller.abort();
    };
    await assert.rejects(all, (error) => error instanceof CancelledError && error.received.text === "4");
    await gone(seen[0].request);
  });
});

test("leaving a stream, or a time limit, closes it", async () => {
  await against([streams([event("4", [7])], "open")], async (client, seen) => {
    for await (const _ of client.generateStream("x")) break;
    await gone(seen[0].request);
  });
  const slow = async (client, seen) => {
    const all = async () => {
      for await (const _ of client.generateStream("x"));
    };
    await assert.rejects(all, (error) => error instanceof TimeoutError && error.received.text === "4");
    await gone(seen[0].request);
  };
  await against([streams([event("4", [7])], "open")], slow, { timeoutMs: 100 });
});

test("the key, the id and the options are sent, camelCase as its own name", async () => {
  const work = async (client, seen) => {
    await client.generate({ prompt: "x", maxTokens: 4, top_k: 2, block_length: 8, stream: true, timeout: 9 });
    assert.equal(seen[0].headers.authorization, "Bearer k");
    assert.match(seen[0].headers["x-request-id"], /^c-[0-9a-f]{32}$/);
    assert.deepEqual(seen[0].body, { prompt: "x", max_tokens: 4, top_k: 2, block_length: 8, timeout: 9, model: "m" });
  };
  await against([ok], work, { apiKey: "k", model: "m" });
});

test("options that cannot be are refused before they are sent", async () => {
  await against([], async (client) => {
    for (const bad of [{}, { prompt: "x", messages: [] }, { prompt: "x", n: 2 }, { prompt: "x", topK: 1, top_k: 2 }]) {
      await assert.rejects(client.generate(bad), InvalidRequestError);
    }
  });
  assert.throws(() => new Client({ url: "localhost:8000" }), InvalidRequestError);
});

test("no JSON is a protocol error", async () => {
  await against([(_, response) => response.writeHead(200, { "content-type": "application/json" }).end("<html>")], (client) =>
    assert.rejects(client.generate("x"), ProtocolError),
  );
});

/** Resolves when the client has closed the connection of a request. */
function gone(request) {
  return new Promise((resolve) => (request.socket.destroyed ? resolve() : request.socket.once("close", resolve)));
}
