// Elements. Whatever people and models write becomes text nodes: nothing is ever parsed as markup.

const byId = id => document.getElementById(id);

// A child is a node or text; null, undefined and false are left out.
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key === "class") node.className = value;
    else if (key.startsWith("--")) node.style.setProperty(key, value);
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter(child => child !== null && child !== undefined && child !== false));
  return node;
}

// One of the page's symbols.
function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("class", "i");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

const iconButton = (name, label, onclick, attributes = {}) =>
  el("button", { type: "button", class: "icon", "aria-label": label, title: label, onclick, ...attributes }, icon(name));

// Tells screen readers.
const announce = text => { byId("status").textContent = text; };

// Tells everybody for a while; `action` is a button's [label, function].
let toastTimer;
function toast(text, action) {
  clearTimeout(toastTimer);
  const dismiss = () => byId("toast").replaceChildren();
  const act = action && el("button", { type: "button", onclick: () => { dismiss(); action[1](); } }, action[0]);
  byId("toast").replaceChildren(el("div", {}, text, act));
  toastTimer = setTimeout(dismiss, action ? 8000 : 3000);
}

// Says on the button that it worked.
async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Browsers give pages that came over plain HTTP from another machine no clipboard.
    const area = el("textarea", { class: "visually-hidden" }, text);
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  const before = button.firstChild;
  button.replaceChildren(icon("check"));
  announce("Copied");
  setTimeout(() => button.replaceChildren(before), 1200);
}

function download(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

function grow(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + area.offsetHeight - area.clientHeight}px`;
}
