/**
 * The client over a WebSocket: many calls at once on one connection, which comes back by itself when it breaks.
 *
 * What a broken connection means for a call: one that was not sent yet is sent on the next connection; one that was sent
 * ends with ConnectionLostError, whose `received` holds what had come, because the server may have run and billed it.
 * `health`, `metadata` and `cancel` cost nothing and are asked again.
 */
import { Calls, type CommonOptions, type Json, type Parts } from "./calls.js";
import { ClientError, ConnectionFailedError, ConnectionLostError, NotFoundError, PermissionDeniedError, ofFrame } from "./errors.js";
import { type Limit, again } from "./limit.js";
import { type Exchange, Link, type SocketClass, address } from "./link.js";
import { AnswerReader, PipelineReader, health } from "./reading.js";
import type { GenerationResult, HealthStatus, PipelineEvent, PipelineResult, RuntimeMetadata, TokenData } from "./results.js";
import { End } from "./stream.js";

export interface WebSocketOptions extends CommonOptions {
  /** Of the server, ws:// or http://; /ws is added where it has no path. Default ws://127.0.0.1:8000/ws. */
  url?: string | undefined;
  /** A tenant follows from its key; one that is given must be the key's, or connecting fails. */
  tenantId?: string | undefined;
  /** Come back by itself when the connection breaks, and connect for a call that finds none. Default true. */
  reconnect?: boolean | undefined;
  /** Milliseconds, the `firstMs` of the backoff (Realm's name). */
  reconnectInterval?: number | undefined;
  /** Milliseconds, the same as timeoutMs (Realm's name). */
  timeout?: number | undefined;
  /** To connect and authenticate in. Default 10,000. */
  connectTimeoutMs?: number | undefined;
  /** The class of sockets: the global one of browsers and Node 22, or `WebSocket` of the package ws. */
  WebSocket?: SocketClass | undefined;
}

/** What is told: connected (the tenant), disconnected (why), reconnecting, error (an error that belongs to no call). */
export interface Events {
  connected: string;
  disconnected: string;
  reconnecting: undefined;
  error: ClientError;
}
type Callback<Name extends keyof Events> = (data: Events[Name]) => unknown;

export class WebSocketClient extends Calls {
  readonly url: string;
  readonly #options: WebSocketOptions;
  readonly #socketClass: SocketClass;
  readonly #callbacks: { [Name in keyof Events]: Set<Callback<Name>> } = {
    connected: new Set(),
    disconnected: new Set(),
    reconnecting: new Set(),
    error: new Set(),
  };
  #link: Link | undefined;
  #opening: Promise<Link> | undefined;
  #closed = false;
  #returning: Limit | undefined;
  #numbers = 0;

  constructor(options: WebSocketOptions = {}) {
    const backoff = { ...(options.reconnectInterval !== undefined && { firstMs: options.reconnectInterval }), ...options.backoff };
    super({ ...options, timeoutMs: options.timeoutMs ?? options.timeout, backoff });
    this.url = address(options.url ?? "ws://127.0.0.1:8000/ws");
    this.#options = options;
    const found = options.WebSocket ?? (globalThis as { WebSocket?: SocketClass }).WebSocket;
    if (found === undefined) {
      throw new ConnectionFailedError(
        "There is no global WebSocket here (Node before 22): npm install ws, and give { WebSocket } from it.",
      );
    }
    this.#socketClass = found;
  }

  /** Connect and authenticate; nothing where it is connected. */
  async connect(): Promise<void> {
    this.#closed = false;
    await this.#patient(async (limit) => void (await again(() => this.#open(), this.backoff, limit)));
  }

  /** Close the connection. Calls that run end with ConnectionLostError. */
  disconnect(): void {
    this.#closed = true;
    this.#returning?.stop();
    this.#link?.close();
  }

  isConnected(): boolean {
    return this.#link?.isOpen ?? false;
  }

  getModel(): string | undefined {
    return this.model;
  }

  /** The tenant of the key, once connected. */
  getTenantId(): string | undefined {
    return this.#link?.tenantId ?? this.#options.tenantId;
  }

  on<Name extends keyof Events>(event: Name, callback: Callback<Name>): this {
    this.#listeners(event).add(callback);
    return this;
  }

  off<Name extends keyof Events>(event: Name, callback: Callback<Name>): this {
    this.#listeners(event).delete(callback);
    return this;
  }

  onError(callback: Callback<"error">): this {
    return this.on("error", callback);
  }

  async health(): Promise<HealthStatus> {
    return health(await this.#ask("health", {}));
  }

  async metadata(): Promise<RuntimeMetadata> {
    return (await this.#ask("metadata", {})) as unknown as RuntimeMetadata;
  }

  async cancel(requestId: string): Promise<boolean> {
    try {
      return Boolean((await this.#ask("cancel", { id: requestId }))["cancelled"]);
    } catch (error) {
      if (error instanceof NotFoundError) return false;
      throw error;
    }
  }

  protected async whole(_: string, body: Json, limit: Limit): Promise<GenerationResult> {
    return new AnswerReader(limit.requestId).complete(await this.#last("generate", body, limit));
  }

  protected async *parts(_: string, body: Json, limit: Limit): Parts<TokenData, GenerationResult> {
    limit.start();
    const reader = new AnswerReader(limit.requestId);
    for await (const { status, data } of this.#frames("generate", body, limit)) {
      yield status === "complete" ? new End(reader.complete(data)) : reader.frame(data);
    }
  }

  protected async *steps(name: string, input: unknown, limit: Limit): Parts<PipelineEvent, PipelineResult> {
    limit.start();
    const reader = new PipelineReader(limit.requestId);
    for await (const { status, data } of this.#frames("pipeline", { name, input, stream: true }, limit)) {
      yield status === "complete" ? new End(reader.ended(data)) : reader.event(data);
    }
  }

  #listeners<Name extends keyof Events>(event: Name): Set<Callback<Name>> {
    const found = this.#callbacks[event];
    if (found === undefined) {
      throw new TypeError(`There is no event ${event}; there are ${Object.keys(this.#callbacks).join(", ")}.`);
    }
    return found;
  }

  #emit<Name extends keyof Events>(event: Name, data: Events[Name]): void {
    for (const callback of this.#callbacks[event]) callback(data);
  }

  /** The connection, opened where there is none; one opening at a time. Rejects after one try. */
  #open(): Promise<Link> {
    if (this.#link?.isOpen) return Promise.resolve(this.#link);
    this.#opening ??= this.#opened().finally(() => (this.#opening = undefined));
    return this.#opening;
  }

  async #opened(): Promise<Link> {
    const { apiKey, tenantId, connectTimeoutMs } = this.#options;
    const link = await Link.open(this.url, this.#socketClass, apiKey, connectTimeoutMs ?? 10_000);
    if (this.#closed) {
      link.close();
      throw new ConnectionFailedError("The client was disconnected meanwhile.");
    }
    if (tenantId !== undefined && tenantId !== link.tenantId) {
      link.close();
      throw new PermissionDeniedError(`The key is of the tenant ${link.tenantId}, not of ${tenantId}.`, { param: "tenantId" });
    }
    link.onStray = (frame) => this.#emit("error", ofFrame(frame["error"]));
    link.onLost = () => this.#lost(link);
    this.#link = link;
    this.#emit("connected", link.tenantId);
    return link;
  }

  #lost(link: Link): void {
    this.#emit("disconnected", link.why);
    if (this.#closed || this.#options.reconnect === false) return;
    this.#emit("reconnecting", undefined);
    this.#patient((limit) => again(() => this.#open(), this.backoff, (this.#returning = limit))).catch((error: unknown) => {
      if (!this.#closed) this.#emit("error", error as ClientError);
    });
  }

  /** Work without a limit of its own but the backoff's attempts. */
  async #patient<T>(work: (limit: Limit) => Promise<T>): Promise<T> {
    const limit = this.limit("", "connect");
    try {
      return await work(limit);
    } finally {
      limit.clear();
    }
  }

  async #ready(limit: Limit): Promise<Link> {
    if (this.#link?.isOpen) return this.#link;
    if (this.#closed || this.#options.reconnect === false) {
      const message = "There is no connection; connect() makes one. Nothing was sent.";
      throw new ConnectionFailedError(message, { requestId: limit.requestId });
    }
    return this.#open();
  }

  /**
   * Send a call and wait for its first frame. Rejects with ConnectionFailedError where it was not sent, or (repeat) where
   * that makes no difference.
   */
  async #begin(name: string, params: Json, limit: Limit, repeat: boolean): Promise<[Exchange, Json]> {
    const exchange = (await this.#ready(limit)).begin(limit);
    const { requestId: id } = limit;
    const { tenantId } = this.#options;
    try {
      exchange.send({ id, function: name, params, ...(tenantId !== undefined && { tenant_id: tenantId }) });
      return [exchange, await exchange.next()];
    } catch (error) {
      exchange.close();
      if (repeat && error instanceof ConnectionLostError) {
        throw new ConnectionFailedError(error.message, { requestId: id, cause: error });
      }
      throw error;
    }
  }

  /** The frames of a call, `complete` last. Closing it early cancels the call on the server. */
  async *#frames(name: string, params: Json, limit: Limit, repeat = false): AsyncGenerator<{ status: unknown; data: Json }> {
    const reconnect = this.#options.reconnect !== false && !this.#closed;
    const begin = (): Promise<[Exchange, Json]> => this.#begin(name, params, limit, repeat);
    const [exchange, first] = await again(begin, this.backoff, limit, reconnect);
    try {
      for (let frame = first; ; frame = await exchange.next()) {
        yield { status: frame["status"], data: frame["data"] as Json };
        if (frame["status"] === "complete") return;
      }
    } finally {
      exchange.close();
    }
  }

  /** The data of the `complete` frame. */
  async #last(name: string, params: Json, limit: Limit, repeat = false): Promise<Json> {
    let last: Json = {};
    for await (const { data } of this.#frames(name, params, limit, repeat)) last = data;
    return last;
  }

  /** The data of a call that costs nothing. */
  #ask(name: string, params: Json): Promise<Json> {
    return this.limited("", (limit) => this.#last(name, params, limit, true), `${name}-${this.#numbers++}`);
  }
}
