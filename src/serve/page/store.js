// What the browser keeps: settings under one key, each conversation under a key of its own, so that two tabs do not overwrite each other's.

const SETTINGS = "upcycle.settings";
const CHAT = "upcycle.chat.";

const settings = {
  theme: "system",
  key: "",
  model: "",
  system: "",
  // by the API's names; what is not there is the server's default
  sampling: {},
  colours: true,
  // by model: { bias: {name: number}, mask: [name], force: [name], k: number or null }
  steering: {},
  ...read(SETTINGS),
};

function read(key) {
  try {
    return JSON.parse(localStorage.getItem(key)) ?? undefined;
  } catch {
    return undefined;
  }
}

function write(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

const saveSettings = () => write(SETTINGS, settings);

const newChat = () => ({ id: crypto.getRandomValues(new Uint32Array(2)).join("-"), title: "", updated: Date.now(), messages: [] });

// Newest first.
function allChats() {
  let keys = [];
  try {
    keys = Object.keys(localStorage);
  } catch { /* a browser that keeps nothing has no conversations */ }
  const chats = keys.filter(key => key.startsWith(CHAT)).map(read);
  return chats.filter(chat => Array.isArray(chat?.messages)).sort((a, b) => b.updated - a.updated);
}

const loadChat = id => read(CHAT + id);

function saveChat(chat) {
  if (write(CHAT + chat.id, chat)) return;
  // Who spoke is most of what is kept, and the least missed.
  for (const other of allChats()) {
    other.messages.forEach(message => delete message.tokens);
    write(CHAT + other.id, other);
  }
  if (!write(CHAT + chat.id, chat)) toast("The browser has no room to keep this conversation: delete older ones.");
}

function deleteChat(id) {
  try {
    localStorage.removeItem(CHAT + id);
  } catch { /* nothing was kept */ }
}
