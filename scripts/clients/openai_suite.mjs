// The `openai` package for Node against `upcycle serve`.
//
// usage: node openai_suite.mjs URL MODEL [KEY]        (npm install openai)
import assert from "node:assert/strict";
import OpenAI from "openai";

const [url, model, apiKey = "none"] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey, maxRetries: 0 });
const messages = [{ role: "user", content: "Compute 12 + 30." }];
// What a tiny model writes ends before long: booleans, and not the likeliest token for ever.
const drawn = { temperature: 1, seed: 1 };
const parameters = { type: "object", properties: { a: { type: "boolean" } }, required: ["a"], additionalProperties: false };

const checks = {
  async models() {
    const ids = [];
    for await (const one of client.models.list()) ids.push(one.id);
    assert(ids.includes(model));
  },
  async chat() {
    const whole = await client.chat.completions.create({ model, messages, max_tokens: 12, temperature: 0 });
    let text = "";
    for await (const chunk of await client.chat.completions.create({ model, messages, max_tokens: 12, temperature: 0, stream: true }))
      text += chunk.choices[0]?.delta.content ?? "";
    assert.equal(text, whole.choices[0].message.content);
  },
  async text() {
    const whole = await client.completions.create({ model, prompt: "Problem:", max_tokens: 5 });
    assert.equal(whole.usage.completion_tokens, 5);
  },
  async tools() {
    const tools = [{ type: "function", function: { name: "add", parameters } }];
    const stream = client.chat.completions.stream({ model, messages, tools, tool_choice: "required", max_tokens: 200, ...drawn });
    const call = (await stream.finalChatCompletion()).choices[0].message.tool_calls[0];
    assert.deepEqual([call.function.name, Object.keys(JSON.parse(call.function.arguments))], ["add", ["a"]]);
  },
  async schemas() {
    const response_format = { type: "json_schema", json_schema: { name: "answer", strict: true, schema: parameters } };
    const answer = await client.chat.completions.create({ model, messages, response_format, max_tokens: 200, ...drawn });
    assert.equal(typeof JSON.parse(answer.choices[0].message.content).a, "boolean");
  },
  async errors() {
    await assert.rejects(client.chat.completions.create({ model: "no-such-model", messages }), OpenAI.NotFoundError);
    await assert.rejects(client.chat.completions.create({ model, messages, top_p: 7 }), OpenAI.BadRequestError);
  },
  async leaving() {
    const stream = await client.completions.create({ model, prompt: "Problem:", max_tokens: 400, stream: true });
    for await (const _ of stream) break;
  },
};

for (const [name, check] of Object.entries(checks)) {
  await check();
  console.log(`openai for Node: ${name}`);
}
