// The conversation: its messages, and the answers that come in.

let current = newChat();
// by conversation: itself and what stops its answer
const running = new Map();
// by message: the element that shows it
const shown = new WeakMap();
const scroller = byId("scroll");

// ---- messages

function drawMessages() {
  const nodes = current.messages.map((message, i) => messageNode(message, i));
  byId("messages").replaceChildren(...(nodes.length ? nodes : [welcome()]));
  showRunning();
  toEnd();
}

function welcome() {
  const count = experts.names.length;
  return el("div", { class: "welcome" },
    el("div", { class: "mark" }, el("i"), el("i"), el("i"), el("i")),
    el("h2", {}, state.ready ? `Talk to ${settings.model}` : "One moment"),
    el("p", {}, !state.ready ? state.words : count ? `${count} experts are listening. Colours will show who of them speaks.` : "It runs on this server, and what you write goes nowhere else."));
}

function messageNode(message, i) {
  const user = message.role === "user";
  const body = el("div", { class: "body" });
  const node = el("article", { class: message.role, "aria-label": user ? "You" : message.model ?? "Answer" }, body);
  shown.set(message, node);
  if (user) body.textContent = message.content;
  const copier = iconButton("copy", "Copy the message", () => copy(message.content, copier));
  node.append(el("div", { class: "tools" }, copier,
    user ? iconButton("edit", "Edit the message", () => edit(i)) : iconButton("again", "Answer again", () => regenerate(i)),
    !user && el("span", { class: "facts" })));
  if (!user) paint(message);
  return node;
}

// Brings an answer's element up to date.
function paint(message) {
  const node = shown.get(message);
  if (!node) return;
  const stay = atEnd();
  showMarkdown(node.querySelector(".body"), message.content, painter(message));
  node.classList.toggle("waiting", message.live === true);
  node.querySelector(".facts").textContent = message.live ? "" : facts(message);
  node.querySelector(".error")?.remove();
  if (message.error) {
    const i = current.messages.indexOf(message);
    node.querySelector(".body").after(el("div", { class: "error", role: "alert" }, el("p", {}, message.error), el("button", { type: "button", onclick: () => regenerate(i) }, "Try again")));
  }
  if (stay) toEnd();
}

function facts(message) {
  const { usage, seconds, finish, stopped } = message;
  return [
    speakers(message),
    usage && `${usage} token${usage === 1 ? "" : "s"}`,
    usage > 1 && seconds > 0 && `${((usage - 1) / seconds).toFixed(1)} per second`,
    finish === "length" && "cut off at the limit of tokens",
    stopped && "stopped",
  ].filter(Boolean).join(" · ");
}

const atEnd = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 40;
const toEnd = () => { scroller.scrollTop = scroller.scrollHeight; };

// ---- answers

function requestBody(chat) {
  const said = chat.messages.filter(({ role, content }) => role === "user" || content).map(({ role, content }) => ({ role, content }));
  const system = settings.system.trim() ? [{ role: "system", content: settings.system.trim() }] : [];
  return {
    model: settings.model || undefined, messages: [...system, ...said], stream: true, stream_options: { include_usage: true },
    ...settings.sampling, ...steeringFields(),
  };
}

// Has the conversation as it is answered.
async function answer(chat) {
  const body = requestBody(chat);
  const message = { role: "assistant", content: "", model: settings.model, live: true };
  if (experts.names.length) message.experts = experts.names;
  const controller = new AbortController();
  running.set(chat.id, { chat, controller });
  chat.messages.push(message);
  keep(chat);
  drawMessages();
  announce("Answering");
  let painting = 0, saved = performance.now(), began = 0;
  try {
    const response = await request("/v1/chat/completions", { body, signal: controller.signal });
    for await (const chunk of events(response)) {
      take(message, chunk);
      if (message.content) began ||= performance.now();
      painting ||= requestAnimationFrame(() => { painting = 0; paint(message); });
      if (performance.now() - saved > 1000) { saved = performance.now(); keep(chat); }
    }
  } catch (error) {
    if (controller.signal.aborted) message.stopped = true;
    else {
      message.error = error.message;
      if (error.status === 401) askForKey(error.message);
    }
  }
  cancelAnimationFrame(painting);
  delete message.live;
  if (began) message.seconds = (performance.now() - began) / 1000;
  running.delete(chat.id);
  if (loadChat(chat.id)) keep(chat);
  paint(message);
  showRunning();
  drawHistory();
  announce(message.error ?? (message.stopped ? "Stopped" : `Answer: ${message.content}`));
}

function take(message, chunk) {
  if (chunk.usage) message.usage = chunk.usage.completion_tokens;
  const [choice] = chunk.choices;
  if (!choice) return;
  const piece = choice.delta?.content ?? "";
  if (choice.experts) noteTokens(message, choice.experts, piece, message.content.length);
  message.content += piece;
  if (choice.finish_reason) message.finish = choice.finish_reason;
}

function keep(chat) {
  chat.updated = Date.now();
  saveChat(chat);
}

function stop() {
  running.get(current.id)?.controller.abort();
}

// Everything that follows a message goes, and what is said instead is answered.
function regenerate(i) {
  if (running.has(current.id)) return;
  current.messages.length = i;
  answer(current);
  byId("prompt").focus();
}

function say(text, i = current.messages.length) {
  current.messages.length = i;
  current.messages.push({ role: "user", content: text });
  showAddress();
  answer(current);
  drawHistory();
}

function edit(i) {
  if (running.has(current.id)) return;
  const message = current.messages[i], node = shown.get(message);
  const field = el("textarea", { "aria-label": "Edit the message", oninput: () => grow(field), onkeydown: event => {
    if (event.key === "Escape") { event.stopPropagation(); cancel(); }
    if (sends(event)) { event.preventDefault(); done(); }
  } }, message.content);
  const cancel = () => { drawMessages(); byId("prompt").focus(); };
  const done = () => { if (field.value.trim()) { say(field.value.trim(), i); byId("prompt").focus(); } };
  node.classList.add("editing");
  node.replaceChildren(field, el("div", { class: "row" },
    el("button", { type: "button", class: "quiet", onclick: cancel }, "Cancel"), el("button", { type: "button", class: "primary", onclick: done }, "Send")));
  grow(field);
  field.focus();
}

// Enter, but not the one that ends the writing of a Chinese or Japanese word.
const sends = event => event.key === "Enter" && !event.shiftKey && !event.isComposing;

// ---- conversations

function openChat(id) {
  current = (id && (running.get(id)?.chat ?? loadChat(id))) || newChat();
  drawMessages();
  drawHistory();
  showAddress();
  if (narrow.matches) closePanels();
}

// A page that is loaded again shows the same conversation.
const showAddress = () => history.replaceState(null, "", current.messages.length ? `#${current.id}` : location.pathname);

function showRunning() {
  const busy = running.has(current.id);
  const button = byId("send");
  button.replaceChildren(icon(busy ? "stop" : "send"));
  button.setAttribute("aria-label", busy ? "Stop the answer" : "Send");
  button.classList.toggle("busy", busy);
  byId("messages").setAttribute("aria-busy", busy);
}
