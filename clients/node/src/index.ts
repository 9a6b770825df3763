/**
 * Client of dfastllm servers: HTTP and WebSocket.
 *
 *     import { Client } from "@dfastllm/client";
 *     const client = new Client({ url: "http://127.0.0.1:8000", model: "demo-ar" });
 *     console.log((await client.generate("What is 12 + 30?")).text);
 */
export type { Backoff } from "./backoff.js";
export {
  AuthenticationError,
  CancelledError,
  ClientError,
  ConnectionFailedError,
  ConnectionLostError,
  type ErrorInfo,
  InvalidRequestError,
  NotFoundError,
  NotReadyError,
  PermissionDeniedError,
  ProtocolError,
  RateLimitError,
  type Received,
  ServerError,
  TimeoutError,
} from "./errors.js";
export { Client, type ClientOptions } from "./http.js";
export type { Socket, SocketClass } from "./link.js";
export type { CallOptions, GenerationOptions } from "./options.js";
export { Realm, type RealmOptions, RealmWebSocketClient } from "./realm.js";
export {
  type FunctionMetadata,
  GenerationResult,
  HealthStatus,
  type ParamMetadata,
  type PipelineEvent,
  type PipelineResult,
  type RuntimeMetadata,
  TokenData,
} from "./results.js";
export type { PipelineStream, TokenStream } from "./stream.js";
export { type Events, WebSocketClient, type WebSocketOptions } from "./websocket.js";
export type * as wire from "./wire.js";
export type { CanvasEvent } from "./wire.js";
