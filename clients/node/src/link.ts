/**
 * One WebSocket connection: opening it, and the calls whose frames mix on it. Knows nothing of reconnecting: a connection
 * that broke ends its calls with ConnectionLostError, and is thrown away.
 */
import type { Json } from "./calls.js";
import {
  AuthenticationError,
  CancelledError,
  ClientError,
  ConnectionFailedError,
  ConnectionLostError,
  InvalidRequestError,
  ProtocolError,
  ofFrame,
} from "./errors.js";
import type { Limit } from "./limit.js";
import { packed } from "./options.js";
import { object } from "./sse.js";

/** What this client uses of a WebSocket: that of browsers, of Node 22 and of the `ws` package. */
export interface Socket {
  readonly readyState: number;
  send(text: string): void;
  close(code?: number, reason?: string): void;
  onmessage: ((event: any) => any) | null;
  onclose: ((event: any) => any) | null;
  onerror: ((event: any) => any) | null;
}
export type SocketClass = new (url: string) => Socket;

const OPEN = 1;
const TOO_LARGE = 1009; // the close code

function tooLarge(size: number, why: string, requestId: string): ClientError {
  const more = why ? `: ${why}` : "";
  const message = `The call has ${size} bytes, which is more than the server takes${more}.`;
  return new InvalidRequestError(message, { status: 413, code: "payload_too_large", requestId });
}

/** A server's address as that of its WebSocket: http becomes ws, and no path becomes /ws. */
export function address(url: string): string {
  let parts: URL;
  try {
    parts = new URL(url.replace(/^http/, "ws"));
  } catch (cause) {
    throw new InvalidRequestError(`The url of a WebSocket is like ws://host:8000/ws, got ${url}.`, { cause });
  }
  if (parts.protocol !== "ws:" && parts.protocol !== "wss:") {
    throw new InvalidRequestError(`The url of a WebSocket is like ws://host:8000/ws, got ${url}.`, { param: "url" });
  }
  if (parts.pathname === "/") parts.pathname = "/ws";
  return parts.href;
}

/** One call on a connection: it is sent once, and its frames come until a last one. */
export class Exchange {
  readonly #link: Link;
  readonly #limit: Limit;
  readonly #frames: (Json | ClientError)[] = [];
  #wake: (() => void) | undefined;
  #running = false;
  /** Bytes that were sent. */
  size = 0;
  readonly #ended = (): void => this.take(this.#limit.error ?? new CancelledError("The call was aborted."));

  constructor(link: Link, limit: Limit) {
    this.#link = link;
    this.#limit = limit;
    limit.signal.addEventListener("abort", this.#ended, { once: true });
  }

  /** Throws ConnectionFailedError while it is certain that nothing was sent. */
  send(call: Json): void {
    const text = packed(call);
    this.size = new TextEncoder().encode(text).length;
    this.#link.send(text, this.#limit.requestId);
    this.#running = true;
  }

  /** A frame of this call, or why there will be no more. */
  take(item: Json | ClientError): void {
    const ownEnd = item instanceof ClientError && !(item instanceof ConnectionLostError);
    if (ownEnd) this.#frames.length = 0; // what came is no longer wanted
    this.#frames.push(item);
    this.#wake?.();
  }

  /** The next frame, `streaming` or `complete`. Rejects with a ClientError for the other ends of a call. */
  async next(): Promise<Json> {
    if (this.#limit.error !== undefined) throw this.#limit.error;
    while (this.#frames.length === 0) await new Promise<void>((wake) => (this.#wake = wake));
    const frame = this.#frames.shift() as Json | ClientError;
    const requestId = this.#limit.requestId;
    if (frame instanceof ClientError) {
      if (frame instanceof ConnectionLostError) this.#running = false;
      throw frame;
    }
    this.#running = frame["status"] === "streaming";
    switch (frame["status"]) {
      case "streaming":
      case "complete":
        return frame;
      case "error":
        throw ofFrame(frame["error"], requestId);
      case "cancelled":
        throw new CancelledError("The call was cancelled.", { status: 499, requestId });
      default:
        throw new ProtocolError(`A reply with the status ${String(frame["status"])}.`, { requestId });
    }
  }

  /** No more is wanted of this call. What still runs is cancelled on the server; nothing is waited for. */
  close(): void {
    this.#limit.signal.removeEventListener("abort", this.#ended);
    const id = this.#limit.requestId;
    this.#link.forget(id);
    if (this.#running && this.#link.isOpen) {
      this.#link.send(packed({ id: `${id}-end`, function: "cancel", params: { id } }), id);
    }
    this.#running = false;
  }
}

export class Link {
  tenantId = "";
  version = "";
  /** The end of the connection in words. */
  why = "it is open";
  /** Is shown frames that are about no call. */
  onStray: (frame: Json) => void = () => undefined;
  onLost: () => void = () => undefined;
  readonly #socket: Socket;
  readonly #exchanges = new Map<string, Exchange>();

  private constructor(socket: Socket) {
    this.#socket = socket;
  }

  /** Connect and authenticate. Rejects with ConnectionFailedError or AuthenticationError. */
  static open(url: string, socketClass: SocketClass, apiKey: string | undefined, timeoutMs: number): Promise<Link> {
    return new Promise((resolve, reject) => {
      const socket = new socketClass(url);
      const link = new Link(socket);
      const end = (error: ClientError): void => {
        clearTimeout(timer);
        socket.onmessage = socket.onclose = null;
        socket.close();
        reject(error);
      };
      const timer = setTimeout(() => {
        end(new ConnectionFailedError(`No connection to ${url} in ${timeoutMs / 1000} s.`));
      }, timeoutMs);
      let cause: unknown;
      socket.onerror = (event: { error?: unknown; message?: string }) => (cause = event.error ?? event.message);
      socket.onclose = (event: { code: number; reason: string }) => {
        const why = cause instanceof Error ? cause.message : (cause ?? `close code ${event.code} ${event.reason}`);
        end(new ConnectionFailedError(`No connection to ${url}: ${String(why).trim()}.`, { cause }));
      };
      socket.onmessage = (event: { data: unknown }) => {
        try {
          if (!link.#greeted(object(String(event.data), "A frame"), apiKey)) return;
          clearTimeout(timer);
          link.#attend();
          resolve(link);
        } catch (error) {
          end(error as ClientError);
        }
      };
    });
  }

  get isOpen(): boolean {
    return this.#socket.readyState === OPEN;
  }

  begin(limit: Limit): Exchange {
    const exchange = new Exchange(this, limit);
    this.#exchanges.set(limit.requestId, exchange);
    return exchange;
  }

  forget(id: string): void {
    this.#exchanges.delete(id);
  }

  /** Throws ConnectionFailedError where the connection had ended: nothing was sent then. */
  send(text: string, requestId: string): void {
    if (!this.isOpen) {
      throw new ConnectionFailedError(`The connection had ended (${this.why}). The call was not sent.`, { requestId });
    }
    this.#socket.send(text);
  }

  close(): void {
    this.#socket.close(1000);
  }

  /** One frame of the opening; whether calls are taken now. */
  #greeted(frame: Json, apiKey: string | undefined): boolean {
    switch (frame["type"] ?? frame["status"]) {
      case "auth_required":
        if (apiKey === undefined) throw new AuthenticationError("The server asks for an API key; give apiKey.", { status: 401 });
        this.#socket.send(JSON.stringify({ type: "auth", api_key: apiKey }));
        return false;
      case "auth_failed":
        throw new AuthenticationError(String(frame["error"]), { status: 401 });
      case "auth_success":
        return false;
      case "connected":
        this.tenantId = String(frame["tenant_id"]);
        this.version = String(frame["version"]);
        return true;
      default:
        throw new ProtocolError(`The server opened with ${JSON.stringify(frame).slice(0, 200)}.`);
    }
  }

  /** From now on every frame goes to its call, until the connection ends, and then every call gets its end. */
  #attend(): void {
    this.#socket.onerror = () => undefined; // a close follows
    this.#socket.onmessage = (event: { data: unknown }) => {
      let frame: Json;
      try {
        frame = object(String(event.data), "A frame");
      } catch (error) {
        this.why = (error as Error).message;
        this.#socket.close(4002, "not understood");
        return;
      }
      const exchange = this.#exchanges.get(String(frame["id"]));
      if (exchange !== undefined) exchange.take(frame);
      else if (frame["id"] === null || frame["id"] === undefined) this.onStray(frame);
    };
    this.#socket.onclose = (event: { code: number; reason: string }) => {
      if (this.why === "it is open") this.why = `close code ${event.code} ${event.reason}`.trim();
      const largest = Math.max(0, ...[...this.#exchanges.values()].map((exchange) => exchange.size));
      for (const [requestId, exchange] of this.#exchanges) {
        if (event.code === TOO_LARGE && exchange.size === largest) {
          exchange.take(tooLarge(largest, event.reason, requestId)); // the server never read it: it did not run
          continue;
        }
        const message = `The connection broke (${this.why}). The call was sent and is not sent again: it may have run.`;
        exchange.take(new ConnectionLostError(message, { requestId }));
      }
      this.onLost();
    };
  }
}
