// The server: requests, its errors in its own words, and its streams.

class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function request(path, { body, signal } = {}) {
  const headers = settings.key ? { Authorization: `Bearer ${settings.key}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal, cache: "no-store" });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ServerError(0, `${location.host} does not answer.`);
  }
  if (!response.ok) {
    const text = await response.text();
    throw new ServerError(response.status, errorIn(text) ?? `${response.status} ${response.statusText}`);
  }
  return response;
}

function errorIn(text) {
  try {
    return JSON.parse(text).error?.message;
  } catch {
    return undefined;
  }
}

const getJson = async path => (await request(path)).json();

// The objects of a stream of events, until the server says that it is done.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { done, value } = await reader.read();
    if (done) throw new ServerError(0, "The connection ended before the answer did.");
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ServerError(0, event.error.message);
      yield event;
    }
  }
}
