/** Uses the app with OpenAI's package for JavaScript; prints what it saw as JSON. Arguments: base URL, model. */

import OpenAI, { APIConnectionTimeoutError, APIUserAbortError, BadRequestError, NotFoundError } from "openai";

const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0, timeout: 60_000 });
const messages = [{ role: "user", content: "Who said that?" }];
const endless = { logit_bias: { 2: -100 } }; // no end of text, so that an answer is as long as it may be
const options = { model, messages, temperature: 0, max_tokens: 20 };

async function failure(promise, kind) {
  try {
    await promise;
  } catch (error) {
    if (error instanceof kind) return { status: error.status ?? null, code: error.code ?? null };
    throw error;
  }
  throw new Error(`no ${kind.name}`);
}

const whole = await client.chat.completions.create({ ...options, logprobs: true, top_logprobs: 1 });
let streamed = "";
let usage = null;
for await (const chunk of await client.chat.completions.create({
  ...options,
  stream: true,
  stream_options: { include_usage: true },
})) {
  streamed += chunk.choices[0]?.delta.content ?? "";
  usage = chunk.usage ?? usage;
}
const several = await client.chat.completions.create({ ...options, n: 2, temperature: 1, seed: 5 });
const text = await client.completions.create({ model, prompt: "The quick brown fox", temperature: 0, max_tokens: 30 });
const stop = text.choices[0].text.slice(8, 11);
const stopped = await client.completions.create({
  model,
  prompt: "The quick brown fox",
  temperature: 0,
  max_tokens: 30,
  stop: [stop],
});

const long = await client.completions.create({ model, ...endless, prompt: "a", max_tokens: 1900, stream: true });
for await (const chunk of long) {
  if (chunk.choices[0]?.text) break; // hangs up
}
const abort = new AbortController();
const aborted = failure(
  client.completions.create({ model, ...endless, prompt: "a", max_tokens: 1900 }, { signal: abort.signal }),
  APIUserAbortError,
);
setTimeout(() => abort.abort(), 100);

console.log(
  JSON.stringify({
    models: (await client.models.list()).data.map(({ id }) => id),
    whole: whole.choices[0].message.content,
    logprobs: whole.choices[0].logprobs.content.length,
    tokens: whole.usage.completion_tokens,
    streamed,
    usage,
    several: several.choices.map(({ message }) => message.content),
    text: text.choices[0].text,
    stop,
    stopped: stopped.choices[0],
    aborted: await aborted,
    unknown: await failure(client.chat.completions.create({ ...options, model: "gpt-4" }), NotFoundError),
    tooLong: await failure(client.chat.completions.create({ ...options, max_tokens: 9999 }), BadRequestError),
    timeOut: await failure(
      client.chat.completions.create({ ...options, ...endless, max_tokens: 1900 }, { timeout: 20 }),
      APIConnectionTimeoutError,
    ),
  }),
);
