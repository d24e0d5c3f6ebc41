// The panel beside the chat: experts, how tokens are drawn, the system prompt, the key; and the looks of the page.

// name, label, what an empty field means, range
const SAMPLING = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, about: "0 takes the most likely token" },
  { name: "top_p", label: "Top p", min: 0, max: 1, step: 0.01, about: "among the most likely tokens of this probability together" },
  { name: "top_k", label: "Top k", min: 0, max: 200, step: 1, about: "among so many tokens; 0 for all" },
  { name: "min_p", label: "Min p", min: 0, max: 1, step: 0.01, about: "at least this likely beside the most likely token" },
  { name: "max_tokens", label: "Max tokens", min: 1, about: "of one answer" },
  { name: "seed", label: "Seed", about: "the same seed, the same answer" },
];
const THEMES = ["system", "light", "dark"];

function drawControls() {
  const system = el("textarea", { id: "system", rows: 3, placeholder: "What the model should be", oninput: () => { settings.system = system.value; saveSettings(); } }, settings.system);
  const key = el("input", { id: "key", type: "password", autocomplete: "off", value: settings.key, placeholder: "None", onchange: () => { settings.key = key.value.trim(); saveSettings(); connect(); } });
  byId("controls").replaceChildren(
    iconButton("close", "Close", () => showPanel("controls", false), { class: "icon closer" }),
    el("section", { id: "experts", hidden: true }),
    el("section", {},
      el("h2", {}, "Answers"),
      el("label", { class: "above", for: "system" }, "System prompt"), system,
      el("div", { id: "sampling" }),
      el("div", { class: "row" }, el("button", { type: "button", class: "quiet", onclick: () => { settings.sampling = {}; saveSettings(); drawSampling(); } }, "As the model recommends"))),
    el("section", {}, el("h2", {}, "Connection"), el("form", { onsubmit: event => event.preventDefault() }, el("label", { class: "above", for: "key" }, "API key"), key), el("p", {}, "Kept in this browser.")));
  drawSampling();
}

function drawSampling() {
  byId("sampling").replaceChildren(...SAMPLING.map(samplingRow));
}

// A number and, where its range is known, a slider; an empty number leaves the choice to the server.
function samplingRow({ name, label, about, ...range }) {
  const set = value => {
    if (Number.isFinite(value)) settings.sampling[name] = value; else delete settings.sampling[name];
    row.classList.toggle("unset", !(name in settings.sampling));
    saveSettings();
  };
  const value = settings.sampling[name];
  const number = el("input", { id: `sampling-${name}`, type: "number", placeholder: "auto", ...range, value, title: about, oninput: () => { set(number.valueAsNumber); if (slider) slider.value = number.value; } });
  const slider = range.max !== undefined && el("input", { type: "range", ...range, value: value ?? range.min, "aria-label": `${label}, slider`, oninput: () => { number.value = slider.value; set(slider.valueAsNumber); } });
  const row = el("div", { class: `row ${name in settings.sampling ? "" : "unset"}` }, el("label", { for: number.id, title: about }, label), slider, number);
  return row;
}

function showTheme() {
  const { theme } = settings;
  document.documentElement.dataset.theme = theme;
  const label = theme === "system" ? "Colours: as the system" : `Colours: ${theme}`;
  byId("theme").replaceChildren(icon(theme));
  byId("theme").setAttribute("aria-label", label);
  byId("theme").title = label;
}

function nextTheme() {
  settings.theme = THEMES[(THEMES.indexOf(settings.theme) + 1) % THEMES.length];
  saveSettings();
  showTheme();
}

// On a narrow screen a panel lies over the chat, one at a time, with the rest out of reach.
const narrow = matchMedia("(max-width: 60rem)");

function showPanel(id, open) {
  document.body.classList.toggle(`${id}-open`, open);
  byId(`toggle-${id}`).setAttribute("aria-expanded", open);
  byId(id).inert = !open;
  const over = narrow.matches && open;
  if (over) showPanel(id === "history" ? "controls" : "history", false);
  byId("backdrop").hidden = !over;
  document.querySelector("main").inert = over;
  if (over) byId(id).querySelector("button, input")?.focus();
  else if (narrow.matches && !open && document.activeElement === document.body) byId(`toggle-${id}`).focus();
}

const panelOpen = id => document.body.classList.contains(`${id}-open`);

function closePanels() {
  for (const id of ["history", "controls"]) if (panelOpen(id)) showPanel(id, false);
}
