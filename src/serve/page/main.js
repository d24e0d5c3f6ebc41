// The page comes up: the server is asked who it is, what was said last is shown, and buttons and keys get their meaning.

const state = {
  ready: false,
  // it wants a key that it did not get
  locked: false,
  words: "The server is being asked.",
};
const RETRY = 1500;

// Asks for the models until there is one, and shows what the server says until then.
let retry;
async function connect() {
  clearTimeout(retry);
  try {
    await request("/health");
    const models = (await getJson("/v1/models")).data.map(model => model.id);
    if (models.length) return await pickFrom(models);
    state.words = "No model is served.";
  } catch (error) {
    state.words = error.message;
    state.locked = error.status === 401;
  }
  state.ready = false;
  if (!current.messages.length) drawMessages();
  if (state.locked) askForKey(state.words); else retry = setTimeout(connect, RETRY);
}

async function pickFrom(models) {
  Object.assign(state, { ready: true, locked: false });
  if (!models.includes(settings.model)) settings.model = models[0];
  byId("model").replaceChildren(...models.map(name => el("option", { selected: name === settings.model }, name)));
  byId("model").hidden = models.length < 2;
  byId("model-name").textContent = models.length < 2 ? settings.model : "";
  document.title = `${settings.model} · upcycle`;
  await openExperts();
  drawMessages();
}

function askForKey(words) {
  const dialog = byId("key-dialog");
  const field = el("input", { type: "password", id: "key-field", autocomplete: "off", required: true, value: settings.key });
  dialog.replaceChildren(el("form", { method: "dialog", onsubmit: () => {
    settings.key = field.value.trim();
    saveSettings();
    drawControls();
    connect();
  } },
  el("h2", { id: "key-title" }, "This server wants a key"), el("p", {}, words),
  el("label", { class: "above", for: "key-field" }, "API key"), field,
  el("div", { class: "row" }, el("button", { class: "primary" }, "Go on"))));
  if (!dialog.open) dialog.showModal();
}

function submit(event) {
  event.preventDefault();
  if (running.has(current.id)) return stop();
  const text = byId("prompt").value.trim();
  if (!text) return;
  byId("prompt").value = "";
  grow(byId("prompt"));
  say(text);
}

function onKey(event) {
  if (event.key === "Escape") {
    if (byId("key-dialog").open) return;
    if (narrow.matches && (panelOpen("history") || panelOpen("controls"))) closePanels();
    else stop();
  } else if (event.target === byId("prompt")) {
    if (sends(event)) submit(event);
    else if (event.key === "ArrowUp" && !event.target.value) {
      const last = current.messages.findLastIndex(message => message.role === "user");
      if (last >= 0) { event.preventDefault(); edit(last); }
    }
  }
}

byId("new").append(icon("plus"), "New conversation");
byId("export-all").append(icon("save"), "Export all");
byId("toggle-history").append(icon("menu"));
byId("toggle-controls").append(icon("tune"));
byId("to-end").append(icon("down"));

byId("new").addEventListener("click", () => { openChat(null); byId("prompt").focus(); });
byId("export-all").addEventListener("click", exportAll);
for (const id of ["history", "controls"]) {
  byId(`toggle-${id}`).addEventListener("click", () => showPanel(id, !panelOpen(id)));
  showPanel(id, !narrow.matches);
}
narrow.addEventListener("change", () => ["history", "controls"].forEach(id => showPanel(id, !narrow.matches)));
byId("backdrop").addEventListener("click", closePanels);
byId("theme").addEventListener("click", nextTheme);
byId("model").addEventListener("change", async () => { settings.model = byId("model").value; saveSettings(); await openExperts(); drawMessages(); });
byId("composer").addEventListener("submit", submit);
byId("prompt").addEventListener("input", () => grow(byId("prompt")));
byId("to-end").addEventListener("click", toEnd);
scroller.addEventListener("scroll", () => { byId("to-end").hidden = atEnd(); });
document.querySelector(".skip").addEventListener("click", event => { event.preventDefault(); byId("prompt").focus(); });
document.addEventListener("keydown", onKey);
document.addEventListener("pointerover", showTip);
// Another tab has said something.
addEventListener("storage", event => { if (event.key?.startsWith(CHAT)) drawHistory(); });
// What is half said when the page goes is kept.
addEventListener("pagehide", () => { if (running.has(current.id)) saveChat(current); });

showTheme();
drawControls();
showRunning();
openChat(location.hash.slice(1));
byId("prompt").focus();
connect();
