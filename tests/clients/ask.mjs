// JavaScript clients of OpenAI's and Anthropic's APIs at their typed defaults, against a running server.
//
//     make clients                                     # their packages, and this against the embedded model
//     mlx-mtp serve --model FOLDER --temperature 1 &   # or by hand: a model whose template knows tools
//     cp tests/clients/ask.mjs build/clients && node build/clients/ask.mjs http://127.0.0.1:8080 MODEL [WORDS]
//
// Node looks for packages beside the file. A line a client and way of asking, as in ask.py.

import Anthropic from "@anthropic-ai/sdk";
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, Output, streamText, tool } from "ai";
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const [url, model, ...words] = process.argv.slice(2);
const baseURL = `${url}/v1`, apiKey = "-", most = 300;
const question = "Name a city in Switzerland and say how many people live there.";
const messages = [{ role: "user", content: question }];
// Within bounds: a very small model writes for ever where it may.
const City = z.object({ name: z.string().max(40), population: z.number().int().min(0).max(100_000_000) });
const openai = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const claude = new Anthropic({ baseURL: url, apiKey, maxRetries: 0 });
const schema = z.toJSONSchema(City);

async function text(stream, piece) {
  let found = "";
  for await (const event of stream) found += piece(event) ?? "";
  if (!found) throw new Error("an empty stream");
  return found;
}

const cases = {
  "openai chat stream": async () =>
    text(await openai.chat.completions.create({ model, messages, max_tokens: most, stream: true }),
         (chunk) => chunk.choices[0]?.delta.content),
  "openai chat parse": async () =>
    (await openai.chat.completions.parse({ model, messages, max_tokens: most,
      response_format: zodResponseFormat(City, "city") })).choices[0].message.parsed.name,
  "openai chat tool": async () =>
    City.parse(JSON.parse((await openai.chat.completions.create({ model, messages, max_tokens: most,
      tools: [{ type: "function", function: { name: "city", parameters: schema } }], tool_choice: "required" }))
      .choices[0].message.tool_calls[0].function.arguments)),
  "openai responses stream": async () =>
    text(await openai.responses.create({ model, input: question, max_output_tokens: most, stream: true }),
         (event) => (event.type === "response.output_text.delta" ? event.delta : "")),
  "openai responses parse": async () =>
    (await openai.responses.parse({ model, input: question, max_output_tokens: most,
      text: { format: zodTextFormat(City, "city") } })).output_parsed.name,
  "anthropic stream": async () => (await claude.messages.stream({ model, messages, max_tokens: most }).finalText()),
  "anthropic tool": async () =>
    City.parse((await claude.messages.create({ model, messages, max_tokens: most, tool_choice: { type: "any" },
      tools: [{ name: "city", input_schema: schema }] })).content.find((block) => block.type === "tool_use").input),
  "anthropic count": async () => (await claude.messages.countTokens({ model, messages })).input_tokens,
};

const providers = {
  openai: createOpenAI({ baseURL, apiKey })(model), // the Responses API
  "openai chat": createOpenAI({ baseURL, apiKey }).chat(model),
  compatible: createOpenAICompatible({ name: "here", baseURL, supportsStructuredOutputs: true })(model),
  anthropic: createAnthropic({ baseURL, apiKey })(model),
};
const people = tool({ description: "How many live in a city.", inputSchema: z.object({ city: z.string().max(40) }),
                      execute: async () => 134_000 });
for (const [name, chosen] of Object.entries(providers)) {
  const asked = { model: chosen, prompt: question, maxOutputTokens: most, maxRetries: 0 };
  cases[`ai ${name} generateText`] = async () => (await generateText(asked)).text;
  cases[`ai ${name} streamText`] = async () => text(streamText(asked).textStream, (piece) => piece);
  cases[`ai ${name} generateObject`] = async () => (await generateObject({ ...asked, schema: City })).object.name;
  cases[`ai ${name} Output.object`] = async () =>
    (await generateText({ ...asked, output: Output.object({ schema: City }) })).output.name;
  cases[`ai ${name} tools`] = async () => {
    const found = await generateText({ ...asked, tools: { people }, toolChoice: { type: "tool", toolName: "people" },
                                       providerOptions: { anthropic: { disableParallelToolUse: true } } });
    return found.toolResults[0].output;
  };
}

let failed = 0;
for (const [name, ask] of Object.entries(cases)) {
  if (words.length && !words.some((word) => name.includes(word))) continue;
  try {
    console.log(`passed  ${name}: ${JSON.stringify(await ask())?.slice(0, 80)}`);
  } catch (error) {
    failed += 1;
    const why = error.responseBody ?? error.cause?.message ?? error.message;
    console.log(`FAILED  ${name}: ${error.name}: ${String(why).replace(/\s+/g, " ").slice(0, 300)}`);
  }
}
process.exitCode = failed ? 1 : 0;
