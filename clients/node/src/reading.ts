/** From the server's JSON to results: whole answers and chunks of HTTP, frames of the WebSocket. No I/O. */
import { ProtocolError, ServerError, ofEvent } from "./errors.js";
import {
  type FunctionMetadata,
  GenerationResult,
  HealthStatus,
  type ParamMetadata,
  type PipelineEvent,
  type PipelineResult,
  type RuntimeMetadata,
  TokenData,
  type TokenFacts,
} from "./results.js";
import type {
  CanvasEvent,
  ChatChunkChoice,
  ChatCompletion,
  Completion,
  CompletionChoice,
  Figures,
  StepResult,
  ToolCallMore,
  ToolCallOut,
  UsageOut,
} from "./wire.js";

type Json = Record<string, unknown>;
type Call = ToolCallOut | ToolCallMore;

/** A whole answer of /v1/completions or /v1/chat/completions. */
export function ofAnswer(body: Json, requestId: string): GenerationResult {
  const answer = body as unknown as Completion | ChatCompletion;
  const choice = answer.choices?.[0];
  if (choice === undefined) {
    throw new ProtocolError(`An answer without choices: ${JSON.stringify(body).slice(0, 200)}`, { requestId });
  }
  const message = "message" in choice ? choice.message : undefined;
  const text = "text" in choice ? choice.text : (message?.content ?? "");
  return result(body, answer, text, choice.finish_reason ?? "stop", message?.tool_calls ?? [], requestId);
}

function result(
  raw: Json,
  took: { model: string; usage: UsageOut; dfastllm: Figures },
  text: string,
  finishReason: string,
  toolCalls: readonly ToolCallOut[],
  requestId: string,
): GenerationResult {
  const { usage } = took;
  const ms = 1000 * took.dfastllm.total_seconds;
  const cost = (usage as UsageOut & { cost_usd?: number }).cost_usd;
  return new GenerationResult(
    text, usage.completion_tokens, usage.prompt_tokens, ms, finishReason, took.model, requestId, toolCalls, cost, raw,
  ); // prettier-ignore
}

/** Chunks of an HTTP stream, or frames of a WebSocket one, to TokenData and at the end a GenerationResult. */
export class AnswerReader {
  readonly #calls = new Map<number, ToolCallOut>();
  #text = "";
  #tokens = 0;
  #finish: string | undefined;
  #model = "";
  #usage: UsageOut | undefined;
  #figures: Figures | undefined;
  #last: Json = {};

  constructor(readonly requestId: string) {}

  /** One chunk of HTTP; undefined where it says only what the result will. Throws ClientError for an error in it. */
  chunk(chunk: Json): TokenData | undefined {
    if ("error" in chunk) throw ofEvent(chunk, this.requestId);
    this.#usage = (chunk["usage"] as UsageOut | null | undefined) ?? this.#usage;
    this.#figures = (chunk["dfastllm"] as Figures | null | undefined) ?? this.#figures;
    this.#model = String(chunk["model"] ?? this.#model);
    const canvas = chunk["canvas"] as { events: CanvasEvent[] } | null | undefined;
    if (canvas) return this.#piece({ canvas: canvas.events });
    const choice = (chunk["choices"] as (ChatChunkChoice | CompletionChoice)[] | undefined)?.[0];
    if (choice === undefined) return undefined;
    this.#last = chunk;
    const delta = "delta" in choice ? choice.delta : undefined;
    const text = "text" in choice ? choice.text : (delta?.content ?? "");
    const tokenIds = choice.token_ids ?? [];
    if (delta?.role && !text && !tokenIds.length && choice.finish_reason === null) return undefined;
    return this.#piece({
      text,
      tokens: tokenIds.length,
      tokenIds,
      finishReason: choice.finish_reason ?? undefined,
      logprob: logprob(choice.logprobs),
      toolCalls: delta?.tool_calls ?? [],
    });
  }

  /** The data of a `streaming` frame. */
  frame(data: Json): TokenData {
    if (data["type"] === "canvas") return this.#piece({ canvas: data["events"] as CanvasEvent[] });
    if (data["type"] !== "token") {
      throw new ProtocolError(`A stream's frame of type ${String(data["type"])}; this client knows token and canvas.`);
    }
    return this.#piece({
      text: String(data["text"]),
      tokens: Number(data["tokens"]),
      tokenIds: (data["token_ids"] as number[] | undefined) ?? [],
      finishReason: data["is_final"] ? String(data["finish_reason"]) : undefined,
      logprob: data["logprob"] as number | undefined,
      toolCalls: (data["tool_calls"] as Call[] | undefined) ?? [],
    });
  }

  /** The result of an HTTP stream that ended as it should. */
  ended(): GenerationResult {
    if (this.#finish === undefined || this.#usage === undefined || this.#figures === undefined) {
      throw new ServerError("The stream ended before its answer did.", { requestId: this.requestId });
    }
    const took = { model: this.#model, usage: this.#usage, dfastllm: this.#figures };
    return result(this.#last, took, this.#text, this.#finish, this.#whole(), this.requestId);
  }

  /** The result of a `complete` frame. */
  complete(data: Json): GenerationResult {
    const choice = (data["choices"] as (Json & { message?: { tool_calls?: ToolCallOut[] } })[] | undefined)?.[0];
    return new GenerationResult(
      String(data["text"]),
      Number(data["tokens_generated"]),
      Number(data["prompt_tokens"]),
      Number(data["time_ms"]),
      String(data["finish_reason"]),
      String(data["model"]),
      this.requestId,
      choice?.message?.tool_calls ?? this.#whole(),
      data["cost_usd"] as number | undefined,
      data,
    );
  }

  #piece(facts: Omit<TokenFacts, "index">): TokenData {
    const piece = new TokenData({ ...facts, index: this.#tokens });
    this.#tokens += piece.tokens;
    this.#text += piece.text;
    this.#finish = piece.finishReason ?? this.#finish;
    for (const call of piece.toolCalls) this.#call(call);
    return piece;
  }

  /** A call's beginning, or more of its arguments. */
  #call(piece: Call): void {
    const index = piece.index ?? 0;
    const known = this.#calls.get(index);
    if (known !== undefined) known.function.arguments += piece.function.arguments;
    else if ("id" in piece) {
      const { index: _, ...begun } = piece;
      this.#calls.set(index, { ...begun, function: { ...begun.function } });
    }
  }

  #whole(): ToolCallOut[] {
    return [...this.#calls].sort(([a], [b]) => a - b).map(([, call]) => call);
  }
}

/** Of a chunk with one token: of completions, or of chats. */
function logprob(of: unknown): number | undefined {
  const given = of as { token_logprobs?: number[]; content?: { logprob: number }[] } | null | undefined;
  const values = given?.token_logprobs ?? given?.content?.map((entry) => entry.logprob) ?? [];
  return values.length === 1 ? values[0] : undefined;
}

export function health(data: Json, version?: string): HealthStatus {
  return new HealthStatus(
    String(data["status"]),
    (data["version"] as string | undefined) ?? version,
    data["uptime_seconds"] as number | undefined,
    (data["models"] as string[] | undefined) ?? [],
  );
}

interface Schema {
  $ref?: string;
  type?: string;
  anyOf?: Schema[];
  default?: unknown;
  description?: string;
  required?: string[];
  properties?: Record<string, Schema>;
}
interface Body {
  content?: Record<string, { schema?: Schema }>;
}
interface Operation {
  summary?: string;
  description?: string;
  parameters?: { name: string; description?: string; required?: boolean; schema?: Schema }[];
  requestBody?: Body;
  responses?: Record<string, Body>;
}
interface Api {
  info: { version: string };
  paths: Record<string, Record<string, Operation>>;
  components?: { schemas?: Record<string, Schema> };
}

/** The operations of an openapi.json, as functions. */
export function openapiMetadata(given: Json): RuntimeMetadata {
  const api = given as unknown as Api;
  const functions = Object.entries(api.paths).flatMap(([path, operations]) =>
    Object.entries(operations).map(([method, operation]): FunctionMetadata => {
      const answer = operation.responses?.["200"];
      return {
        name: `${method.toUpperCase()} ${path}`,
        description: operation.description ?? operation.summary ?? "",
        params: params(operation, api.components?.schemas ?? {}),
        returns: referred(answer),
        streaming: "text/event-stream" in (answer?.content ?? {}),
      };
    }),
  );
  return { version: api.info.version, functions };
}

function referred(body: Body | undefined): string | undefined {
  return body?.content?.["application/json"]?.schema?.$ref?.split("/").pop();
}

function params(operation: Operation, schemas: Record<string, Schema>): ParamMetadata[] {
  const body = schemas[referred(operation.requestBody) ?? ""] ?? {};
  return [
    ...(operation.parameters ?? []).map((one) => param(one.name, one.schema ?? {}, !!one.required, one.description)),
    ...Object.entries(body.properties ?? {}).map(([name, field]) =>
      param(name, field, !!body.required?.includes(name), field.description),
    ),
  ];
}

function param(name: string, schema: Schema, required: boolean, description = ""): ParamMetadata {
  return { name, type: kind(schema), description, required, default: schema.default };
}

function kind(schema: Schema): string {
  if (schema.anyOf) return [...new Set(schema.anyOf.map(kind))].join(" | ");
  return schema.type ?? schema.$ref?.split("/").pop() ?? "any";
}

/** Events of a pipeline's run, and at its end the result. */
export class PipelineReader {
  constructor(readonly requestId: string) {}

  /** One event. Throws ClientError for an error in it. */
  event(data: Json): PipelineEvent {
    if (typeof data["error"] === "object" && data["error"] !== null) throw ofEvent(data, this.requestId);
    return { type: String(data["type"]), step: String(data["step"]), text: String(data["text"] ?? ""), data };
  }

  /** data: of the event `done`, or of a `complete` frame. */
  ended(data: Json): PipelineResult {
    const { usage } = data as { usage: UsageOut };
    return {
      output: String(data["output"]),
      steps: data["steps"] as StepResult[],
      tokensGenerated: usage.completion_tokens,
      promptTokens: usage.prompt_tokens,
      timeMs: Number(data["time_ms"]),
      requestId: this.requestId,
      raw: data,
    };
  }
}
