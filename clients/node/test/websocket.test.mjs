// What a broken connection means for each call, the opening exchange, and Realm's names.
import assert from "node:assert/strict";
import { test } from "node:test";
import WebSocket, { WebSocketServer } from "ws";
import {
  AuthenticationError,
  CancelledError,
  ConnectionFailedError,
  ConnectionLostError,
  InvalidRequestError,
  PermissionDeniedError,
  ProtocolError,
  RateLimitError,
  Realm,
  RealmWebSocketClient,
  TimeoutError,
  WebSocketClient,
} from "../dist/esm/index.js";

const CONNECTED = { status: "connected", version: "1", tenant_id: "acme" };
const RESULT = { text: "42", finish_reason: "stop", tokens_generated: 2, prompt_tokens: 3, time_ms: 1, model: "m" };

/** One connection, spoken to as in a conversation. */
class Talk {
  #heard = [];
  #wake;
  constructor(socket) {
    this.socket = socket;
    socket.on("message", (text) => {
      this.#heard.push(JSON.parse(String(text)));
      this.#wake?.();
    });
  }
  say(frame) {
    this.socket.send(JSON.stringify(frame));
  }
  async hear() {
    while (!this.#heard.length) await new Promise((wake) => (this.#wake = wake));
    return this.#heard.shift();
  }
  complete(call, data = RESULT) {
    this.say({ id: call.id, status: "complete", data });
  }
  piece(call, text, index) {
    const data = { type: "token", choice: 0, text, token: text, index, tokens: 1, is_final: false };
    this.say({ id: call.id, status: "streaming", data });
  }
}

const answers = async (talk) => {
  talk.say(CONNECTED);
  for (;;) talk.complete(await talk.hear());
};

/** Runs `work` with a client whose connections are talked to like this, one each. */
async function against(talks, work, options = {}, kind = WebSocketClient) {
  const server = new WebSocketServer({ port: 0, host: "127.0.0.1" });
  server.on("connection", (socket) => talks.shift()(new Talk(socket)));
  await new Promise((listening) => server.on("listening", listening));
  const url = `ws://127.0.0.1:${server.address().port}`;
  const client = new kind({ url, endpoint: url, WebSocket, backoff: { attempts: 2, firstMs: 0 }, ...options });
  try {
    return await work(client);
  } finally {
    client.disconnect();
    for (const socket of server.clients) socket.terminate();
    server.close();
  }
}

async function all(stream) {
  for await (const _ of stream);
}

test("a call that was not sent is sent on the next connection", async () => {
  const gone = (talk) => {
    talk.say(CONNECTED);
    talk.socket.close(1001);
  };
  await against([gone, answers], async (client) => {
    const lost = new Promise((resolve) => client.on("disconnected", resolve));
    await client.connect();
    await lost;
    assert.equal((await client.generate("x")).text, "42");
  });
});

test("a call that is larger than the server takes is refused, and the others are lost", async () => {
  const silent = (talk) => {
    talk.say(CONNECTED);
    let bytes = 0;
    talk.socket.on("message", (data) => (bytes = data.length) > 1000 && talk.socket.close(1009, "too large"));
  };
  await against([silent, answers], async (client) => {
    const small = assert.rejects(client.generate("x"), ConnectionLostError);
    const large = assert.rejects(client.generate("x".repeat(3000)), { status: 413, code: "payload_too_large" });
    await Promise.all([small, large]);
  });
});

test("a call that was sent is not sent again", async () => {
  const heard = [];
  const goes = async (talk) => {
    talk.say(CONNECTED);
    heard.push(await talk.hear());
    talk.socket.terminate();
  };
  const counts = async (talk) => {
    talk.say(CONNECTED);
    for (;;) {
      heard.push(await talk.hear());
      talk.complete(heard.at(-1));
    }
  };
  await against([goes, counts], async (client) => {
    await assert.rejects(client.generate("x"), ConnectionLostError);
    assert.equal((await client.generate("y")).text, "42");
  });
  assert.deepEqual(heard.map((call) => call.params.prompt), ["x", "y"]);
});

test("a stream that broke says what came", async () => {
  const half = async (talk) => {
    talk.say(CONNECTED);
    const call = await talk.hear();
    talk.piece(call, "4", 0);
    talk.piece(call, "2", 1);
    setTimeout(() => talk.socket.terminate(), 20);
  };
  await against([half, answers], async (client) => {
    const stream = client.generateStream("x");
    await assert.rejects(all(stream), (error) => {
      assert.ok(error instanceof ConnectionLostError, error);
      assert.deepEqual(error.received, { text: "42", tokens: 2, requestId: stream.requestId });
      return true;
    });
  });
});

test("what costs nothing is asked again", async () => {
  const goes = async (talk) => {
    talk.say(CONNECTED);
    await talk.hear();
    talk.socket.terminate();
  };
  const well = async (talk) => {
    talk.say(CONNECTED);
    talk.complete(await talk.hear(), { status: "ready", version: "1", uptime_seconds: 2, models: [] });
  };
  await against([goes, well], async (client) => {
    const { status, uptimeSeconds, uptime_seconds } = await client.health();
    assert.deepEqual([status, uptimeSeconds, uptime_seconds], ["ready", 2, 2]);
  });
});

test("a refusal is asked again when it says so, and an answer that began is not", async () => {
  const error = { code: "RATE_LIMIT_EXCEEDED", message: "Later.", retry_after: 0 };
  const once = async (talk) => {
    talk.say(CONNECTED);
    talk.say({ id: (await talk.hear()).id, status: "error", error });
    talk.complete(await talk.hear());
    const call = await talk.hear();
    talk.piece(call, "4", 0);
    talk.say({ id: call.id, status: "error", error });
  };
  await against([once], async (client) => {
    assert.equal((await client.generate("x")).text, "42");
    await assert.rejects(all(client.generateStream("x")), (failure) => failure instanceof RateLimitError && failure.received.text === "4");
  });
});

test("a call that is left is cancelled on the server", async () => {
  for (const how of ["leave", "abort", "timeout"]) {
    const heard = [];
    const begins = async (talk) => {
      talk.say(CONNECTED);
      heard.push(await talk.hear());
      talk.piece(heard[0], "4", 0);
      heard.push(await talk.hear());
      talk.say({ id: heard[0].id, status: "cancelled" });
      talk.complete(heard[1], { id: heard[0].id, cancelled: true });
      talk.complete(await talk.hear());
    };
    await against([begins], async (client) => {
      const controller = new AbortController();
      if (how === "leave") for await (const _ of client.generateStream("x")) break;
      if (how === "abort") {
        const stream = client.generateStream({ prompt: "x", signal: controller.signal });
        await assert.rejects(async () => {
          for await (const _ of stream) controller.abort();
        }, CancelledError);
      }
      if (how === "timeout") await assert.rejects(client.generate("x"), TimeoutError);
      assert.equal((await client.generate("y")).text, "42");
    }, { timeoutMs: how === "timeout" ? 500 : 20_000 });
    assert.deepEqual(heard[1], { id: `${heard[0].id}-end`, function: "cancel", params: { id: heard[0].id } }, how);
  }
});

test("calls run at once and their frames may mix", async () => {
  const mixes = async (talk) => {
    talk.say(CONNECTED);
    const calls = [];
    while (calls.length < 20) calls.push(await talk.hear());
    for (const call of calls.reverse()) talk.complete(call, { ...RESULT, text: call.params.prompt });
  };
  await against([mixes], async (client) => {
    const prompts = Array.from({ length: 20 }, (_, number) => String(number));
    const results = await Promise.all(prompts.map((prompt) => client.generate(prompt)));
    assert.deepEqual(results.map(String), prompts);
  });
});

test("the opening with a key", async () => {
  const asks = async (talk) => {
    talk.say({ type: "auth_required" });
    if ((await talk.hear()).api_key === "good") {
      talk.say({ type: "auth_success", tenant_id: "acme" });
      return answers(talk);
    }
    talk.say({ type: "auth_failed", error: "The API key is wrong." });
    talk.socket.close(1008);
  };
  const connects = async (client) => {
    const told = [];
    client.on("connected", (tenant) => told.push(tenant));
    await client.connect();
    assert.ok(client.isConnected());
    assert.deepEqual([client.getTenantId(), told], ["acme", ["acme"]]);
  };
  await against([asks], connects, { apiKey: "good" });
  for (const apiKey of ["bad", undefined]) {
    const talks = [asks, answers];
    await against(talks, (client) => assert.rejects(client.generate("x"), AuthenticationError), { apiKey });
    assert.equal(talks.length, 1, "a wrong key is not tried again");
  }
  await against([asks], (client) => assert.rejects(client.generate("x"), PermissionDeniedError), { apiKey: "good", tenantId: "other" });
});

test("a server that speaks something else, or is not there", async () => {
  await against([(talk) => talk.socket.send("hello")], (client) => assert.rejects(client.generate("x"), ProtocolError));
  const later = async (talk) => {
    talk.say(CONNECTED);
    await talk.hear();
    talk.socket.send("hello");
  };
  await against([later, answers], (client) => assert.rejects(client.generate("x"), /no JSON/));
  await against([], (client) => assert.rejects(client.generate("x"), ConnectionFailedError), { url: "ws://127.0.0.1:1", endpoint: undefined });
});

test("it comes back by itself and tells", async () => {
  const goes = (talk) => {
    talk.say(CONNECTED);
    setTimeout(() => talk.socket.terminate(), 10);
  };
  await against([goes, answers], async (client) => {
    const told = [];
    for (const event of ["disconnected", "reconnecting"]) client.on(event, () => told.push(event));
    await new Promise((resolve) => {
      client.on("connected", () => told.push("connected") && told.filter((one) => one === "connected").length === 2 && resolve());
      void client.connect();
    });
    assert.deepEqual(told, ["connected", "disconnected", "reconnecting", "connected"]);
    assert.throws(() => client.on("connect", () => undefined), TypeError);
  });
});

test("without reconnect a call says that there is no connection", async () => {
  await against([answers], async (client) => {
    await assert.rejects(client.generate("x"), /connect\(\) makes one/);
    await client.connect();
    assert.equal((await client.generate("x")).text, "42");
  }, { reconnect: false });
});

test("errors of no call reach the listener", async () => {
  const strays = async (talk) => {
    talk.say(CONNECTED);
    const call = await talk.hear();
    talk.say({ id: null, status: "error", error: { code: "INVALID_PARAMS", message: "What?" } });
    talk.complete(call);
  };
  await against([strays], async (client) => {
    const told = [];
    client.onError((error) => told.push(error.message));
    await client.generate("x");
    assert.deepEqual(told, ["What?"]);
  });
});

test("Realm's names", async () => {
  assert.equal(RealmWebSocketClient, WebSocketClient);
  assert.throws(() => new Realm({ mode: "local", WebSocket }), InvalidRequestError);
  const seen = [];
  const sees = async (talk) => {
    talk.say(CONNECTED);
    seen.push(await talk.hear());
    talk.complete(seen[0]);
  };
  await against([sees], async (client) => {
    const result = await client.generate({ prompt: "x", max_tokens: 3, stream: false });
    assert.deepEqual([result.text, result.tokens_generated, result.prompt_tokens, result.time_ms], ["42", 2, 3, 1]);
  }, { mode: "server", defaultModel: "m" }, Realm);
  assert.deepEqual(seen[0].params, { prompt: "x", max_tokens: 3, model: "m" });
});

test("without a global WebSocket the way out is named", { skip: "WebSocket" in globalThis }, () => {
  assert.throws(() => new WebSocketClient(), /npm install ws/);
});
