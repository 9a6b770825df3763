/** What calls give back. Realm's names (`tokens_generated`, `is_final`, …) read the same values. */
import type { CanvasEvent, StepResult, ToolCallMore, ToolCallOut } from "./wire.js";

/** A whole answer. */
export class GenerationResult {
  constructor(
    readonly text: string,
    /** Tokens of the answer, as the server counted them. */
    readonly tokensGenerated: number,
    readonly promptTokens: number,
    /** How long the server took, milliseconds. */
    readonly timeMs: number,
    readonly finishReason: string,
    /** The model that answered. */
    readonly model: string,
    /** What the server knows the call by. */
    readonly requestId: string,
    /** Calls of functions, in the form of the OpenAI API. */
    readonly toolCalls: readonly ToolCallOut[],
    /** Only where the server has a price configured. */
    readonly costUsd: number | undefined,
    /** The server's own words, with what has no name here. */
    readonly raw: Record<string, unknown>,
  ) {}

  get tokens_generated(): number {
    return this.tokensGenerated;
  }

  get prompt_tokens(): number {
    return this.promptTokens;
  }

  get time_ms(): number {
    return this.timeMs;
  }

  get cost_usd(): number | undefined {
    return this.costUsd;
  }

  toString(): string {
    return this.text;
  }
}

export interface TokenFacts {
  text?: string;
  index: number;
  tokens?: number;
  finishReason?: string | undefined;
  tokenIds?: readonly number[];
  logprob?: number | undefined;
  toolCalls?: readonly (ToolCallOut | ToolCallMore)[];
  canvas?: readonly CanvasEvent[];
}

/** A piece of a stream, as it came. */
export class TokenData {
  /** The new text; "" where the tokens end no character yet, or only the canvas changed. */
  readonly text: string;
  /** Tokens of the answer that came before this piece. */
  readonly index: number;
  /** How many came with it; a diffusion model often gives several at once. */
  readonly tokens: number;
  /** Whether the answer is complete. */
  readonly isFinal: boolean;
  /** Of the final piece: "stop", "length" or "tool_calls". */
  readonly finishReason: string | undefined;
  readonly tokenIds: readonly number[];
  /** Where log probabilities were asked for and one token came. */
  readonly logprob: number | undefined;
  /** Pieces of calls of functions, in the form of the OpenAI API. */
  readonly toolCalls: readonly (ToolCallOut | ToolCallMore)[];
  /** What a denoising step did, where canvasEvents were asked for. */
  readonly canvas: readonly CanvasEvent[];

  constructor(facts: TokenFacts) {
    this.text = facts.text ?? "";
    this.index = facts.index;
    this.tokens = facts.tokens ?? 0;
    this.finishReason = facts.finishReason;
    this.isFinal = facts.finishReason !== undefined;
    this.tokenIds = facts.tokenIds ?? [];
    this.logprob = facts.logprob;
    this.toolCalls = facts.toolCalls ?? [];
    this.canvas = facts.canvas ?? [];
  }

  /** The same as `text`: Realm's name for it. Not always one token. */
  get token(): string {
    return this.text;
  }

  get is_final(): boolean {
    return this.isFinal;
  }

  toString(): string {
    return this.text;
  }
}

/** status: "ready", "loading", "stopping" or "failed", in the words of the server. */
export class HealthStatus {
  constructor(
    readonly status: string,
    readonly version: string | undefined,
    readonly uptimeSeconds: number | undefined,
    readonly models: readonly string[],
  ) {}

  get uptime_seconds(): number | undefined {
    return this.uptimeSeconds;
  }
}

export interface ParamMetadata {
  name: string;
  type: string;
  description: string;
  required: boolean;
  default?: unknown;
}

export interface FunctionMetadata {
  name: string;
  description: string;
  params: readonly ParamMetadata[];
  returns?: unknown;
  streaming: boolean;
}

/** What the server can do. */
export interface RuntimeMetadata {
  version: string;
  functions: readonly FunctionMetadata[];
}

/** type: "step_started", "step_text" (with new `text`), "step_done" or "step_skipped". step: its id. */
export interface PipelineEvent {
  type: string;
  step: string;
  text: string;
  /** The whole event. */
  data: Record<string, unknown>;
}

/** A run of a pipeline. */
export interface PipelineResult {
  /** Its text. */
  output: string;
  /** What each step did. */
  steps: readonly StepResult[];
  /** Tokens of all steps. */
  tokensGenerated: number;
  promptTokens: number;
  timeMs: number;
  requestId: string;
  raw: Record<string, unknown>;
}
