/**
 * Every error of this client, typed, and how a refusal of the server becomes one.
 *
 * A call that was sent and broke is never sent a second time: the server may have run and billed it. `received` of the
 * error holds the text and the number of tokens that had arrived.
 */

/** What of an answer had arrived when its call failed: enough to go on from there by hand. */
export interface Received {
  text: string;
  tokens: number;
  requestId?: string;
}

/** An error as the WebSocket protocol has it. `retry_after` is in seconds. */
export interface ErrorInfo {
  code: string;
  message: string;
  details?: Record<string, unknown> | undefined;
  retry_after?: number | undefined;
}

export interface ErrorFacts {
  /** The server's word for it, stable, for programs ("model_not_found"). */
  code?: string | undefined;
  /** The HTTP status, also over a WebSocket where the server names it; undefined when there was no answer. */
  status?: number | undefined;
  /** The field of the call that is at fault. */
  param?: string | undefined;
  /** After how many seconds the same call may be sent again. */
  retryAfter?: number | undefined;
  /** More of what the server said. */
  details?: Record<string, unknown> | undefined;
  /** What the server knows the call by. */
  requestId?: string | undefined;
  /** What of the answer had come before. */
  received?: Received | undefined;
  cause?: unknown;
}

/** Root of the tree. */
export class ClientError extends Error {
  readonly code: string;
  readonly status: number | undefined;
  readonly param: string | undefined;
  readonly retryAfter: number | undefined;
  readonly details: Record<string, unknown> | undefined;
  readonly requestId: string | undefined;
  received: Received;

  constructor(message: string, facts: ErrorFacts = {}, code = "error") {
    super(message, facts.cause === undefined ? undefined : { cause: facts.cause });
    this.name = new.target.name;
    this.code = facts.code ?? code;
    this.status = facts.status;
    this.param = facts.param;
    this.retryAfter = facts.retryAfter;
    this.details = facts.details;
    this.requestId = facts.requestId;
    this.received = facts.received ?? { text: "", tokens: 0, ...(facts.requestId && { requestId: facts.requestId }) };
  }

  /** The same as `retryAfter`. */
  get retry_after(): number | undefined {
    return this.retryAfter;
  }

  get info(): ErrorInfo {
    return { code: this.code, message: this.message, details: this.details, retry_after: this.retryAfter };
  }
}

/** 400, 413, 422 and the like: the call cannot be honoured as it is. */
export class InvalidRequestError extends ClientError {
  constructor(message: string, facts?: ErrorFacts) {
    super(message, facts, "invalid_request");
  }
}

/** 401: the key is missing, wrong, disabled or expired. */
export class AuthenticationError extends ClientError {
  constructor(message: string, facts?: ErrorFacts) {
    super(message, facts, "invalid_api_key");
  }
}

/** 403: the key may not do this. */
export class PermissionDeniedError extends ClientError {
  constructor(message: string, facts?: ErrorFacts) {
    super(message, facts, "permission_denied");
  }
}

/** 404: no such model, adapter, pipeline or request. */
export class NotFoundError extends ClientError {
  constructor(message: string, facts?: ErrorFacts) {
    super(message, facts, "not_found");
  }
}

/** 429: carries retryAfter. */
export class RateLimitError extends ClientError {
  constructor(message: string, facts?: ErrorFacts) {
    super(message, facts, "rate_limit_exceeded");
  }
}

/** 499: the call was cancelled, by an AbortSignal, `cancel` or the server. */
export class CancelledError extends ClientError {
  constructor(message: string, facts?: ErrorFacts) {
    super(message, facts, "cancelled");
  }
}

/** 500 and above. */
export class ServerError extends ClientError {
  constructor(message: string, facts?: ErrorFacts, code = "internal_error") {
    super(message, facts, code);
  }
}

/** 503: loading or stopping; carries retryAfter. */
export class NotReadyError extends ServerError {
  constructor(message: string, facts?: ErrorFacts) {
    super(message, facts, "not_ready");
  }
}

/** 504, or the client's own time limit. */
export class TimeoutError extends ClientError {
  constructor(message: string, facts?: ErrorFacts) {
    super(message, facts, "timeout");
  }
}

/** No connection: the call was never sent, nothing was billed. */
export class ConnectionFailedError extends ClientError {
  constructor(message: string, facts?: ErrorFacts) {
    super(message, facts, "connection_failed");
  }
}

/** The connection broke after the call was sent: `received` says what had come. */
export class ConnectionLostError extends ClientError {
  constructor(message: string, facts?: ErrorFacts) {
    super(message, facts, "connection_lost");
  }
}

/** The server said what this client does not understand. */
export class ProtocolError extends ClientError {
  constructor(message: string, facts?: ErrorFacts) {
    super(message, facts, "protocol_error");
  }
}

const BY_STATUS: Record<number, new (message: string, facts?: ErrorFacts) => ClientError> = {
  401: AuthenticationError,
  403: PermissionDeniedError,
  404: NotFoundError,
  429: RateLimitError,
  499: CancelledError,
  503: NotReadyError,
  504: TimeoutError,
};
const STATUS_OF_CODE: Record<string, number> = {
  UNAUTHORIZED: 401,
  RATE_LIMIT_EXCEEDED: 429,
  INVALID_PARAMS: 400,
  DISPATCH_ERROR: 404,
  INTERNAL_ERROR: 500,
};
const STATUS_IN_STREAM: Record<string, number> = {
  cancelled: 499,
  not_ready: 503,
  timeout: 504,
  authentication_error: 401,
  invalid_request_error: 400,
  rate_limit_error: 429,
};

function made(status: number, message: string, facts: ErrorFacts): ClientError {
  const kind = BY_STATUS[status] ?? (status >= 500 ? ServerError : InvalidRequestError);
  return new kind(message, { ...facts, status });
}

function seconds(value: unknown): number | undefined {
  const number = typeof value === "number" ? value : Number.parseFloat(String(value ?? ""));
  return Number.isFinite(number) ? Math.max(0, number) : undefined;
}

function text(value: unknown): string | undefined {
  return typeof value === "string" ? value : undefined;
}

function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** The error of an HTTP answer, `{"error": {message, type, param, code}}`; what is no such body is shown as it is. */
export function ofResponse(
  status: number,
  body: unknown,
  header: (name: string) => string | null,
  requestId?: string,
): ClientError {
  const error = isRecord(body) && isRecord(body["error"]) ? body["error"] : undefined;
  const shown = typeof body === "string" ? body : JSON.stringify(body);
  return made(status, text(error?.["message"]) ?? `HTTP ${status}: ${shown.slice(0, 200)}`, {
    code: text(error?.["code"]),
    param: text(error?.["param"]),
    retryAfter: seconds(header("retry-after")),
    details: error,
    requestId: header("x-request-id") ?? requestId,
  });
}

/** An error after the answer began: its status follows from its code, or from its type. */
export function ofEvent(event: Record<string, unknown>, requestId: string): ClientError {
  const error = isRecord(event["error"]) ? event["error"] : {};
  const status =
    STATUS_IN_STREAM[text(error["code"]) ?? ""] ?? STATUS_IN_STREAM[text(error["type"]) ?? ""] ?? 500;
  return ofResponse(status, event, () => null, requestId);
}

/** The error of a WebSocket frame. Its details name the HTTP status and the finer code where the server has them. */
export function ofFrame(error: unknown, requestId?: string): ClientError {
  const given = isRecord(error) ? error : {};
  const details = isRecord(given["details"]) ? given["details"] : undefined;
  const code = text(given["code"]) ?? "INTERNAL_ERROR";
  const status = details?.["status"];
  return made(
    typeof status === "number" ? status : (STATUS_OF_CODE[code] ?? 500),
    text(given["message"]) ?? code,
    {
      code: text(details?.["code"]) ?? code,
      param: text(details?.["param"]),
      retryAfter: seconds(given["retry_after"]),
      details,
      requestId,
    },
  );
}
