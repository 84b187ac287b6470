// The operator's page: it asks for the report again and again, and shows it as text and lines. Nothing becomes HTML.

const SVG = "http://www.w3.org/2000/svg";
const REQUEST_TIMEOUT = 10_000;

const byId = (id) => document.getElementById(id);
let shownAt = null;

async function update() {
  let interval = 5;
  try {
    if (byId("pause").getAttribute("aria-pressed") === "false") {
      const response = await fetch("/report.json", { signal: AbortSignal.timeout(REQUEST_TIMEOUT) });
      if (!response.ok) throw new Error(await response.text());
      const report = await response.json();
      interval = report.interval;
      show(report);
    }
  } catch {
    tell(`The relay does not answer. ${shownAt ? `This is from ${shownAt}.` : ""}`, true);
  }
  setTimeout(update, interval * 1000);
}

function show(report) {
  document.title = `Relay ${report.id}`;
  setText(byId("relay-id"), report.id);
  shownAt = new Date(report.now_unix * 1000).toLocaleTimeString();
  tell(report.draining ? "It is stopping: new visitors and gateways go elsewhere." : "", report.draining);
  showNow(report);
  showTraffic(report);
  showTunnels(report);
  showRefusals(report);
}

function tell(text, trouble) {
  byId("state").classList.toggle("trouble", Boolean(trouble));
  setText(byId("state"), text);
}

function showNow({ connections, streams, unsent_bytes, unsent_limit_bytes, ...report }) {
  byId("now").replaceChildren(
    ...entry("Tunnels connected", report.tunnels_connected, `of ${report.tunnels_total}`),
    ...entry("Visitors", streams.open, `${streams.opened_total} since the start`),
    ...entry("Connections", connections.open, `of ${connections.limit} at the most`),
    ...entry("Sessions without link", report.suspended_sessions, `of ${report.suspended_sessions_limit} at the most`),
    ...entry("Bytes that wait", bytes(unsent_bytes), `of ${bytes(unsent_limit_bytes)} at the most`),
    ...entry("Running", duration(report.now_unix - report.since_unix), `since ${new Date(report.since_unix * 1000).toLocaleString()}`),
    ...report.workers.flatMap((worker) => showWorker(worker, report.now_unix)),
    ...(report.fleet ? showFleet(report.fleet) : []),
  );
}

function showFleet({ node, redis_reachable, nodes, hops_open, hops_served_total, unannounced_tunnels, ...fleet }) {
  const links = Object.entries(nodes).map(([name, seconds]) => `${name} ${seconds === null ? "no link" : `${(seconds * 1000).toFixed(0)} ms`}`);
  const signed = fleet.unconfirmed_seconds ? `not confirmed for ${duration(fleet.unconfirmed_seconds)}` : "in memory";
  return [
    ...entry(`Node ${node}: Redis`, redis_reachable ? "answers" : "does not answer", `${unannounced_tunnels} tunnels to announce`),
    ...entry("Visitors over other nodes", hops_open, `${hops_served_total} of theirs carried; ${links.join(", ")}`),
    ...(fleet.unconfirmed_seconds === null ? [] : entry("Signed tunnels", fleet.signed_tunnels, signed)),
  ];
}

function showWorker({ index, pid, since_unix, draining, connections, sessions_open, streams, memory_bytes }, now) {
  const parts = [`${sessions_open} sessions`, `${streams.open} visitors`, `process ${pid} for ${duration(now - since_unix)}`];
  if (memory_bytes !== null) parts.push(`${bytes(memory_bytes)} of memory`);
  if (draining) parts.push("drains");
  return entry(`Worker ${index}: connections`, connections.open, parts.join(", "));
}

function showTraffic({ traffic, interval, streams }) {
  byId("traffic").replaceChildren(
    ...entry("From visitors", rate(traffic.from_visitors, interval), `${bytes(streams.from_visitors_bytes_total)} since the start`,
      sparkline(traffic.from_visitors, interval)),
    ...entry("To visitors", rate(traffic.to_visitors, interval), `${bytes(streams.to_visitors_bytes_total)} since the start`,
      sparkline(traffic.to_visitors, interval)),
  );
}

function showTunnels({ tunnels, tunnels_total, interval, now_unix }) {
  const left = tunnels_total - tunnels.length;
  setText(byId("tunnels-note"), left > 0 ? `The ${tunnels.length} busiest; ${left} more are not shown.` : tunnels_total ? "" : "There are none.");
  byId("tunnels").replaceChildren(...tunnels.map((tunnel) => {
    const session = tunnel.sessions.at(-1);
    const sums = tunnel.traffic.from_visitors.map((amount, index) => amount + tunnel.traffic.to_visitors[index]);
    return row(
      cell("th", [tunnel.id, small(tunnel.addresses.join(", "))], { scope: "row" }),
      stateCell(session, tunnel.sessions.length, now_unix),
      cell("td", session ? [session.agent ?? "", small(gatewayDetails(session))] : [], { className: "gateway" }),
      cell("td", [String(tunnel.streams.open), small(`${tunnel.streams.opened_total} in all`)], { className: "number" }),
      cell("td", [sparkline(sums, interval), rate(sums, interval)]),
      cell("td", [String(tunnel.refusals)], { className: "number" }),
    );
  }));
}

function stateCell(session, sessions, now) {
  if (!session) return cell("td", ["○ Away"], { className: "away" });
  const more = small(`for ${duration(now - session.since_unix)}${sessions > 1 ? `, ${sessions} sessions` : ""}`);
  if (session.suspended) return cell("td", ["◌ Link lost", more], { className: "waiting" });
  if (session.draining) return cell("td", ["◌ Leaving", more], { className: "waiting" });
  return cell("td", ["● Connected", more], { className: "connected" });
}

function gatewayDetails({ peer, round_trip_ms, resumes_total }) {
  const parts = [peer];
  if (round_trip_ms !== null) parts.push(`${round_trip_ms.toFixed(1)} ms`);
  if (resumes_total) parts.push(`${resumes_total} resumed`);
  return parts.filter(Boolean).join(", ");
}

function showRefusals({ refusals }) {
  const sum = (numbers) => numbers.reduce((one, other) => one + other, 0);
  const recent = new Map(refusals.map(({ reason, recent: samples }) => [reason, sum(samples)]));
  const sorted = refusals.toSorted((one, other) => recent.get(other.reason) - recent.get(one.reason) || other.total - one.total);
  byId("refusals-table").hidden = refusals.length === 0;
  setText(byId("refusals-note"), refusals.length ? "" : "Nobody was refused since the start.");
  byId("refusals").replaceChildren(...sorted.map(({ reason, recent: samples, total }) => row(
    cell("th", [element("code", [reason])], { scope: "row" }),
    cell("td", [String(recent.get(reason))], { className: "number" }),
    cell("td", [sparkline(samples)]),
    cell("td", [String(total)], { className: "number" }),
  )));
}

// --- Parts ---

// A line over the last ten minutes. Where the unit is bytes, `interval` is given, and the label tells rates.
function sparkline(samples, interval) {
  const most = Math.max(...samples, 0);
  const told = (amount) => (interval ? `${bytes(amount / interval)} per second` : `${amount}`);
  const points = samples.map((amount, index) => `${index},${most ? (1 - amount / most) * 30 + 1 : 31}`).join(" ");
  const last = Math.max(samples.length - 1, 0);
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "spark");
  svg.setAttribute("viewBox", `0 0 ${Math.max(last, 1)} 32`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", samples.length ? `now ${told(samples[last])}, at the most ${told(most)}` : "nothing yet");
  for (const [name, corners] of [["polygon", `0,32 ${points} ${last},32`], ["polyline", points]]) {
    const shape = document.createElementNS(SVG, name);
    shape.setAttribute("points", corners);
    svg.append(shape);
  }
  return svg;
}

function entry(name, value, note, ...more) {
  return [element("div", [element("dt", [name]), element("dd", [String(value), small(note), ...more])])];
}

const row = (...cells) => element("tr", cells);
const cell = (name, parts, attributes) => element(name, parts, attributes);
const small = (text) => element("small", [text]);

function element(name, parts, attributes = {}) {
  const made = Object.assign(document.createElement(name), attributes);
  made.append(...parts);
  return made;
}

function setText(where, text) {
  if (where.textContent !== text) where.textContent = text; // a screen reader announces each change
}

function rate(samples, interval) {
  return `${bytes((samples.at(-1) ?? 0) / interval)}/s`;
}

function bytes(amount) {
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (amount < 1000) return `${amount < 10 && unit !== "B" ? amount.toFixed(1) : Math.round(amount)} ${unit}`;
    amount /= 1000;
  }
  return `${amount.toFixed(1)} TB`;
}

function duration(seconds) {
  if (seconds < 120) return `${Math.max(Math.round(seconds), 0)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} days`;
}

byId("pause").onclick = ({ currentTarget }) => {
  const paused = currentTarget.getAttribute("aria-pressed") !== "true";
  currentTarget.setAttribute("aria-pressed", paused);
  tell(paused ? `Paused. This is from ${shownAt}.` : "", false);
};

update();
