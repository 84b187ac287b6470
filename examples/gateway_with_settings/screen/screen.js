// The settings screen: JSON-RPC over a WebSocket, and what it says shown as text. Nothing here becomes HTML.

const STATES = {
  opening: "Asking the gateway…",
  disabled: "Off",
  starting: "Connecting to the relay…",
  connected: "Connected",
  reconnecting: "The link is lost; connecting again…",
  failed: "Not connected",
  stopped: "The gateway has stopped remote access",
  away: "No connection to this gateway; trying again…",
};
const CONNECTED_WITH_TROUBLE = "Connected, with a problem";
const STATUS_CHANGED = "gateway/remote_access/status_changed";
const LONGEST_WAIT = 10_000;
const LONGEST_TIMER = 2 ** 31 - 1;
const MOST_SHOWN_AT_ONCE = 4;
const NO_SESSION = 401;

const byId = (id) => document.getElementById(id);
const explanations = fetch("/explanations.json").then((response) => response.json());

// The second secret of the session stays in this tab: a cookie alone opens nothing.
const pageSecret = {
  get: () => sessionStorage.getItem("page-secret"),
  set: (secret) => sessionStorage.setItem("page-secret", secret),
  forget: () => sessionStorage.removeItem("page-secret"),
};

// --- JSON-RPC ---

let socket = null;
let wait = 0;
let lastNumber = 0;
let notifications = 0;
const waiting = new Map();

function connect() {
  const opened = new WebSocket(location.origin.replace(/^http/, "ws"), ["remote-access", `page-secret.${pageSecret.get()}`]);
  socket = opened;
  opened.onopen = async () => {
    wait = 0;
    const before = notifications;
    const { settings } = await call("settings/get", {});
    showSettings(settings.remote_access, before);
  };
  opened.onmessage = ({ data }) => receive(JSON.parse(data));
  opened.onclose = async () => {
    if (socket !== opened) return;
    socket = null;
    for (const { reject } of waiting.values()) reject(new Error("The connection to the gateway is lost."));
    waiting.clear();
    showStatus({ state: "away" });
    if (await sessionIsOver()) return showSignIn();
    wait = Math.min(wait * 2 || 500, LONGEST_WAIT);
    setTimeout(connect, wait);
  };
}

async function sessionIsOver() {
  try {
    const response = await fetch("/session", { headers: { "Page-Secret": pageSecret.get() } });
    return response.status === NO_SESSION;
  } catch {
    return false; // the gateway is away
  }
}

function call(method, params) {
  return new Promise((resolve, reject) => {
    if (socket?.readyState !== WebSocket.OPEN) return reject(new Error("There is no connection to the gateway."));
    const id = ++lastNumber;
    waiting.set(id, { resolve, reject });
    socket.send(JSON.stringify({ jsonrpc: "2.0", id, method, params }));
  });
}

function receive(message) {
  if (message.method === STATUS_CHANGED) {
    notifications += 1;
    showStatus(message.params.status);
    return;
  }
  const call = waiting.get(message.id);
  waiting.delete(message.id);
  if (message.error) call?.reject(new Error(message.error.message));
  else call?.resolve(message.result);
}

async function update(change) {
  const before = notifications;
  const { settings } = await call("settings/update", { update: { remote_access: change } });
  showSettings(settings.remote_access, before);
}

// --- What is shown ---

function showSettings(snapshot, notificationsBefore) {
  byId("switch").setAttribute("aria-checked", snapshot.enabled);
  setText("switch-text", snapshot.enabled ? "On" : "Off");
  setText("has-key", snapshot.has_key ? "A key is saved; a new one replaces it." : "No key is saved.");
  // A notification that has come meanwhile is newer, or a newer one follows it.
  if (notifications === notificationsBefore) showStatus(snapshot.status);
}

async function showStatus(status) {
  shown = status;
  const all = await explanations;
  if (shown !== status) return;
  const explanation = Object.hasOwn(all, status.error_kind ?? "") ? all[status.error_kind] : null;
  const trouble = status.state === "connected" && status.error_kind !== undefined;
  byId("status").dataset.trouble = trouble;
  byId("status").dataset.state = status.state;
  setText("state", trouble ? CONNECTED_WITH_TROUBLE : STATES[status.state] ?? status.state);
  setText("summary", explanation?.summary ?? "", withCode);
  setText("message", status.message ?? "");
  showAddress(status.public_url);
  showNext(status, explanation);
  showHelp(status.error_kind, explanation?.causes ?? []);
}
let shown = null;

function showHelp(kind, causes) {
  const help = byId("help");
  if (help.dataset.kind === kind) return; // somebody may have opened it, and be reading
  help.dataset.kind = kind;
  help.hidden = causes.length === 0;
  help.open = causes.length <= MOST_SHOWN_AT_ONCE;
  setText("help-title", `What to do: ${causes.length} possible ${causes.length === 1 ? "cause" : "causes"}`);
  const parts = causes.flatMap(({ text, cure }) => [element("dt", text), element("dd", cure)]);
  byId("causes").replaceChildren(...parts);
}

function showAddress(url) {
  byId("address").hidden = url === undefined;
  if (url === undefined) return;
  const link = element("a", "");
  link.textContent = url;
  if (/^https?:\/\//i.test(url)) link.href = url; // another scheme might run a script
  link.rel = "noreferrer";
  byId("address").replaceChildren("Visitors reach it at ", link);
}

function showNext(status, explanation) {
  clearTimeout(nextTimer);
  const at = status.retry_at_unix * 1000; // NaN without one
  const left = at - Date.now();
  const final = status.state === "failed" && Boolean(explanation?.final) && Number.isNaN(at);
  byId("next").hidden = Number.isNaN(at) && !final;
  if (final) setText("next", "There is no further attempt until something changes.");
  else if (left > 0) {
    setText("next", `The next attempt is at ${new Date(at).toLocaleTimeString()}.`);
    nextTimer = setTimeout(() => showNext(status, explanation), Math.min(left + 1, LONGEST_TIMER));
  } else setText("next", "Trying again now.");
}
let nextTimer = 0;

// Sets a text that has changed: a screen reader announces each change.
function setText(id, text, parts = (whole) => [whole]) {
  const made = document.createElement("span");
  made.append(...parts(text));
  if (byId(id).textContent !== made.textContent) byId(id).replaceChildren(...made.childNodes);
}

function element(name, text) {
  const made = document.createElement(name);
  made.append(...withCode(text));
  return made;
}

// What stands in backticks becomes code.
function withCode(text) {
  return text.split("`").map((part, index) => {
    const code = document.createElement("code");
    code.textContent = part;
    return index % 2 ? code : part;
  });
}

function showSignIn() {
  pageSecret.forget();
  show("sign-in");
  byId("token").focus();
}

function show(id) {
  for (const name of ["sign-in", "settings"]) byId(name).hidden = name !== id;
  byId("sign-out").hidden = id !== "settings";
}

// --- What people do ---

// One action at a time. The button keeps its focus, so that somebody with a keyboard stays where they are.
async function during(button, field, errorId, action) {
  if (button.getAttribute("aria-disabled") === "true") return;
  button.setAttribute("aria-disabled", true);
  setText(errorId, "");
  field?.removeAttribute("aria-invalid");
  try {
    await action();
  } catch (error) {
    setText(errorId, error.message);
    field?.setAttribute("aria-invalid", true);
    field?.focus();
  } finally {
    button.removeAttribute("aria-disabled");
  }
}

byId("switch").onclick = ({ currentTarget }) =>
  during(currentTarget, null, "switch-error", () => update({ enabled: currentTarget.getAttribute("aria-checked") !== "true" }));

byId("key-form").onsubmit = (event) => {
  event.preventDefault();
  const field = byId("key");
  setText("key-saved", "");
  during(event.submitter, field, "key-error", async () => {
    await update({ key: field.value });
    field.value = "";
    setText("key-saved", "The key is saved.");
  });
};

byId("sign-in-form").onsubmit = (event) => {
  event.preventDefault();
  const field = byId("token");
  during(event.submitter, field, "token-error", async () => {
    pageSecret.set(await signIn(field.value.trim()));
    field.value = "";
    begin();
    byId("switch").focus();
  });
};

async function signIn(token) {
  if (!/^[\x21-\x7e]+$/.test(token)) throw new Error("This is not a token.");
  const response = await fetch("/session", { method: "POST", headers: { Authorization: `Bearer ${token}` } });
  if (response.status === NO_SESSION) throw new Error("The token is wrong.");
  if (response.status === 429) {
    throw new Error(`Too many wrong tokens. Try again in ${response.headers.get("Retry-After")} seconds.`);
  }
  if (!response.ok) throw new Error(`The gateway refuses: ${await response.text()}`);
  return (await response.json()).pageSecret;
}

byId("sign-out").onclick = async () => {
  const ended = socket;
  socket = null;
  ended?.close();
  await fetch("/session", { method: "DELETE", headers: { "Page-Secret": pageSecret.get() } }).catch(() => {});
  showSignIn();
};

function begin() {
  show("settings");
  showStatus({ state: "opening" });
  connect();
}

// --- The start ---

const isLocal = ["localhost", "127.0.0.1", "[::1]"].includes(location.hostname);
byId("unencrypted").hidden = isLocal || location.protocol === "https:";
byId("far-hint").hidden = isLocal;
if (pageSecret.get()) begin();
else showSignIn();
