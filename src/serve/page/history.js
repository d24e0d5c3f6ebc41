// The list of conversations: open, rename, delete, export.

function drawHistory() {
  const items = allChats().map(chat => historyItem(chat));
  byId("chats").replaceChildren(...items);
  byId("export-all").hidden = !items.length;
}

const titleOf = chat => chat.title || chat.messages[0]?.content.trim().split("\n")[0].slice(0, 80) || "New conversation";

function historyItem(chat) {
  const title = titleOf(chat);
  const open = el("button", { type: "button", class: "open", "aria-current": chat.id === current.id ? "page" : null, title, onclick: () => openChat(chat.id) }, title);
  return el("li", {}, open,
    iconButton("edit", `Rename ${title}`, event => renameChat(chat.id, event.currentTarget.closest("li"))),
    iconButton("save", `Export ${title}`, () => exportChat(loadChat(chat.id) ?? chat)),
    iconButton("bin", `Delete ${title}`, () => removeChat(chat.id)));
}

function renameChat(id, item) {
  const chat = id === current.id ? current : loadChat(id);
  let done = false;
  const finish = keep => {
    if (done) return;
    done = true;
    if (keep && field.value.trim()) {
      chat.title = field.value.trim();
      saveChat(chat);
    }
    drawHistory();
    focusChat(id);
  };
  const field = el("input", { value: titleOf(chat), "aria-label": "Name of the conversation", onblur: () => finish(true), onkeydown: event => {
    if (event.key === "Enter") finish(true);
    if (event.key === "Escape") { event.stopPropagation(); finish(false); }
  } });
  item.replaceChildren(field);
  field.select();
}

function removeChat(id) {
  const chat = id === current.id ? current : loadChat(id);
  running.get(id)?.controller.abort();
  deleteChat(id);
  if (id === current.id) openChat(null);
  drawHistory();
  byId("new").focus();
  toast(`Deleted “${titleOf(chat)}”.`, ["Undo", () => { saveChat(chat); openChat(id); }]);
}

const focusChat = id => {
  const at = allChats().findIndex(chat => chat.id === id);
  byId("chats").children[at]?.querySelector("button").focus();
};

// As Markdown, for people.
function exportChat(chat) {
  const who = { user: "You", assistant: "Answer", system: "System" };
  const text = chat.messages.map(message => `## ${who[message.role]}\n\n${message.content}\n`).join("\n");
  const name = titleOf(chat).replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40).replace(/^-|-$/g, "") || "conversation";
  download(`${name}.md`, `# ${titleOf(chat)}\n\n${text}`, "text/markdown");
}

// As JSON, with everything that is kept.
const exportAll = () => download("upcycle-conversations.json", JSON.stringify(allChats(), null, 1), "application/json");
