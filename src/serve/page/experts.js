// Experts: who they are, how much each has to do, what the user makes of them, and who spoke which token.

const experts = {
  // of the model that is picked; none if it is dense
  names: [],
  perToken: null,
  // whether one expert has a whole text
  whole: false,
  // by name: the elements that show its load
  rows: new Map(),
};
const BIAS = 10;
const POLL = 2000;

// The palette holds eight; further experts get hues a golden angle apart.
const colourOf = e => e < 8 ? `var(--e${e})` : `oklch(0.65 0.14 ${(e * 137.5) % 360})`;
const percent = share => `${Math.round(share * 100)} %`;

const steering = () => settings.steering[settings.model] ??= { bias: {}, mask: [], force: [], k: null };

// The fields of a request that steer its experts and ask who spoke.
function steeringFields() {
  if (!experts.names.length) return {};
  const { bias, mask, force, k } = steering();
  // Experts that a composite no longer has are kept for the day that it has them again, and not sent.
  const here = names => names.filter(name => experts.names.includes(name));
  const biased = here(Object.keys(bias)).filter(name => bias[name] !== 0);
  return {
    return_experts: settings.colours || undefined,
    experts_per_token: k ?? undefined,
    expert_bias: biased.length ? Object.fromEntries(biased.map(name => [name, bias[name]])) : undefined,
    mask_experts: here(mask).length ? here(mask) : undefined,
    force_experts: here(force).length ? here(force) : undefined,
  };
}

// Asks the server about the picked model's experts and draws their part of the page.
async function openExperts() {
  const answer = await expertsNow();
  experts.names = (answer?.experts ?? []).map(expert => expert.name);
  experts.perToken = answer?.experts_per_token ?? null;
  experts.whole = answer?.layers?.length === 1;
  drawExperts();
  drawLegend();
  if (answer) showLoad(answer);
}

async function expertsNow(load = true) {
  try {
    return await getJson(`/v1/experts?model=${encodeURIComponent(settings.model)}&load=${load}`);
  } catch {
    return null;
  }
}

// Load is asked for only where it is seen.
setInterval(() => {
  if (experts.names.length && document.visibilityState === "visible" && byId("heat")?.checkVisibility()) refreshLoad();
}, POLL);

function drawExperts() {
  const box = byId("experts");
  box.hidden = !experts.names.length;
  experts.rows.clear();
  if (box.hidden) return box.replaceChildren();
  const own = steering();
  const k = el("input", {
    id: "experts-per-token", type: "number", min: 1, max: experts.names.length, placeholder: experts.perToken, value: own.k,
    oninput: event => { own.k = event.target.valueAsNumber || null; saveSettings(); },
  });
  const reset = el("button", { type: "button", class: "quiet", onclick: () => {
    delete settings.steering[settings.model];
    saveSettings();
    drawExperts();
    refreshLoad();
  } }, "Let the routers decide");
  box.replaceChildren(...[
    el("h2", {}, "Experts"),
    el("p", {}, experts.whole ? "One expert has each text. A bias is added to what its words say for an expert."
      : "A bias is added to what the routers give an expert, in every layer."),
    el("ul", { class: "experts" }, ...experts.names.map(expertRow)),
    !experts.whole && el("div", { class: "row" }, el("label", { for: "experts-per-token" }, "Experts per token"), k),
    el("div", { class: "row" }, reset),
    el("h3", {}, experts.whole ? "Load" : "Load by layer"),
    el("div", { id: "heat", role: "img" }),
  ].filter(Boolean));
}

function expertRow(name, e) {
  const own = steering();
  const value = el("output", {}, signed(own.bias[name] ?? 0));
  const bias = el("input", {
    type: "range", min: -BIAS, max: BIAS, step: 0.5, value: own.bias[name] ?? 0, "aria-label": `Bias of ${name}`,
    oninput: () => {
      own.bias[name] = bias.valueAsNumber;
      value.textContent = signed(bias.valueAsNumber);
      saveSettings();
    },
    ondblclick: () => { bias.value = 0; bias.dispatchEvent(new Event("input")); },
  });
  const toggle = (list, label, title) => {
    const button = el("button", { type: "button", class: "toggle", "aria-pressed": String(own[list].includes(name)), "aria-label": `${title} ${name}`, title: `${title} ${name}`, onclick: () => {
      const on = !own[list].includes(name);
      own[list] = on ? [...own[list], name] : own[list].filter(other => other !== name);
      button.setAttribute("aria-pressed", on);
      saveSettings();
    } }, label);
    return button;
  };
  const bar = el("i"), share = el("span", { class: "share" });
  experts.rows.set(name, { bar, share });
  return el("li", { "--c": colourOf(e) },
    el("div", { class: "name" }, el("i", { class: "dot" }), el("b", { title: name }, name), share, toggle("force", "only", "Choose only"), toggle("mask", "off", "Never choose")),
    el("div", { class: "track" }, bar),
    el("div", { class: "bias" }, bias, value));
}

const signed = value => `${value > 0 ? "+" : ""}${value.toFixed(1)}`;

// A page left open keeps no model in memory.
async function refreshLoad() {
  const answer = await expertsNow(false);
  if (answer) showLoad(answer);
}

// The recent load of a layer; before its first token that is nobody's.
const loadOf = layer => layer.recent ?? layer.load ?? [];

function showLoad({ layers, tokens }) {
  const heat = byId("heat");
  if (!heat) return;
  const mean = e => layers.reduce((sum, layer) => sum + (loadOf(layer)[e] ?? 0), 0) / (layers.length || 1);
  const means = experts.names.map((_, e) => mean(e));
  experts.names.forEach((name, e) => {
    const { bar, share } = experts.rows.get(name);
    bar.style.width = `${means[e] * 100}%`;
    share.textContent = tokens ? percent(means[e]) : "";
  });
  if (!tokens) return heat.replaceChildren(el("p", {}, "Nothing has been routed yet."));
  if (experts.whole) return heat.replaceChildren(el("p", {}, `${tokens.toLocaleString()} tokens so far; bars show the last few thousand.`));
  heat.setAttribute("aria-label", `Share of the choices of late: ${experts.names.map((name, e) => `${name} ${percent(means[e])}`).join(", ")}`);
  // No expert can have more than a K-th of the choices: that is the full colour.
  const k = experts.perToken ?? 1;
  const cell = (layer, e) => el("td", {
    "--v": Math.min(100, Math.round((loadOf(layer)[e] ?? 0) * k * 100)),
    title: `${experts.names[e]}, layer ${layer.layer}: ${percent(loadOf(layer)[e] ?? 0)}`,
  });
  const row = (name, e) => el("tr", { "--c": colourOf(e) }, el("th", { title: name }, name), ...layers.map(layer => cell(layer, e)));
  const last = layers.at(-1).layer;
  heat.replaceChildren(
    el("table", {}, ...experts.names.map(row)),
    el("div", { class: "axis" }, el("span", {}, `layer ${layers[0].layer}`), el("span", {}, last)),
    el("p", {}, `${tokens.toLocaleString()} tokens so far; colours show the last few thousand.`));
}

function drawLegend() {
  const legend = byId("legend");
  legend.hidden = !experts.names.length;
  const box = el("input", { type: "checkbox", id: "colours", checked: settings.colours, onchange: () => {
    settings.colours = box.checked;
    saveSettings();
    drawMessages();
  } });
  legend.replaceChildren(
    el("label", {}, box, "Who spoke"),
    el("ul", {}, ...experts.names.map((name, e) => el("li", {}, el("i", { class: "dot", "--c": colourOf(e) }), name))));
}

// Notes who spoke a piece of a message that begins at `at`: [where, how long, percents by expert] of each token.
//
// What is spelled otherwise than it reads, as part of a character or a space that the beginning of a text loses, has what its neighbours leave.
function noteTokens(message, spoken, piece, at) {
  message.tokens ??= [];
  let from = 0, unplaced = null;
  for (const { text, share } of spoken) {
    const shares = share.map(part => Math.round(part * 100));
    const found = text ? piece.indexOf(text, from) : -1;
    if (found < 0 || (found > from && !unplaced)) { unplaced = shares; continue; }
    if (found > from) message.tokens.push([at + from, found - from, unplaced]);
    message.tokens.push([at + found, text.length, shares]);
    from = found + text.length;
    unplaced = null;
  }
  if (unplaced && from < piece.length) message.tokens.push([at + from, piece.length - from, unplaced]);
}

// Gives runs of a message's text the colours of those who spoke; undefined if nobody knows.
function painter(message) {
  const tokens = message.tokens;
  if (!settings.colours || !tokens?.length) return undefined;
  return (text, at) => {
    const nodes = [], end = at + text.length;
    let from = at;
    for (let i = firstAfter(tokens, at); i < tokens.length && tokens[i][0] < end; i++) {
      const [start, length, shares] = tokens[i];
      const begin = Math.max(start, from), stop = Math.min(start + length, end);
      if (begin > from) nodes.push(text.slice(from - at, begin - at));
      const e = leader(shares);
      // An even share is pale, all of it full.
      const strength = Math.round(14 + 46 * Math.max(0, (shares[e] / 100 - 1 / shares.length) / (1 - 1 / shares.length)));
      const node = el("span", { class: "tok", "--c": colourOf(e), "--v": strength }, text.slice(begin - at, stop - at));
      Object.assign(node, { shares, names: message.experts });
      nodes.push(node);
      from = stop;
    }
    if (from < end) nodes.push(text.slice(from - at));
    return nodes;
  };
}

const leader = shares => shares.indexOf(Math.max(...shares));

// The first token that ends after a place.
function firstAfter(tokens, at) {
  let low = 0, high = tokens.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (tokens[middle][0] + tokens[middle][1] <= at) low = middle + 1; else high = middle;
  }
  return low;
}

// Who spoke how much of a message, in words.
function speakers(message) {
  const tokens = message.tokens ?? [];
  if (!tokens.length) return "";
  const total = message.experts.map((name, e) => [name, tokens.reduce((sum, token) => sum + (token[2][e] ?? 0), 0) / tokens.length]);
  return total.filter(([, share]) => share >= 1).sort((a, b) => b[1] - a[1]).map(([name, share]) => `${name} ${Math.round(share)} %`).join(", ");
}

// The shares of the token under the pointer.
function showTip(event) {
  const tip = byId("tip"), token = event.target.closest?.(".tok");
  tip.hidden = !token;
  if (!token) return;
  const rows = token.shares.map((share, e) => [share, e]).filter(([share]) => share > 0).sort((a, b) => b[0] - a[0]);
  tip.replaceChildren(...rows.map(([share, e]) =>
    el("div", { "--c": colourOf(e) }, el("i", { class: "dot" }), el("span", {}, token.names[e]), el("b", {}, `${share} %`))));
  const at = token.getBoundingClientRect(), own = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(8, Math.min(event.clientX - own.width / 2, innerWidth - own.width - 8))}px`;
  tip.style.top = `${at.top - own.height - 8 > 0 ? at.top - own.height - 6 : at.bottom + 6}px`;
}
