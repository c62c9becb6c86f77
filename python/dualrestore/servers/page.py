"""The status page: three small texts. Read-only, no build step, nothing from elsewhere.

Guarantees: whatever a name or an error contains, it is shown as text (textContent), never run;
the content security policy of `control` allows only these two files.
"""

PAGE_HTML = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>dualrestore</title>
<link rel="stylesheet" href="/page.css">
<h1>dualrestore</h1>
<p id="node">waiting for the daemon</p>
<main id="volumes"></main>
<h2>Jobs</h2>
<table><thead><tr><th>job<th>verb<th>volume<th>state<th>done<th>seconds<th>error</tr></thead>
<tbody id="jobs"></tbody></table>
<script src="/page.js"></script>
</html>
"""

PAGE_CSS = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
section { border-top: 1px solid #8886; padding: .5rem 0; }
progress { width: 100%; height: .8rem; }
dl { display: grid; grid-template-columns: repeat(auto-fill, 12rem 1fr); gap: 0 1rem; margin: 0; }
dt { opacity: .7; } dd { margin: 0; font-variant-numeric: tabular-nums; }
table { width: 100%; border-collapse: collapse; } th, td { text-align: left; padding: .1rem .5rem; }
.error { color: #c22; }
"""

PAGE_JS = """"use strict";
const units = [["TiB", 2 ** 40], ["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]];
function bytes(count) {
  for (const [unit, factor] of units) {
    if (count >= factor) return (count / factor).toFixed(1) + " " + unit;
  }
  return count + " B";
}
function element(name, text, kind) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
}
function show(volume) {
  const section = element("section");
  section.append(element("h2", `${volume.name} (${volume.role}): ${volume.state}`));
  if (volume.error) section.append(element("p", volume.error, "error"));
  for (const words of volume.warnings || []) section.append(element("p", words, "error"));
  if (volume.role === "primary") {
    const bar = element("progress");
    bar.max = volume.size;
    bar.value = volume.current_bytes;
    section.append(bar);
  }
  const list = element("dl");
  for (const [key, value] of Object.entries(volume)) {
    if (typeof value !== "number" && typeof value !== "boolean") continue;
    const isBytes = key === "size" || key.includes("bytes");
    list.append(element("dt", key.replaceAll("_", " ")));
    list.append(element("dd", isBytes ? bytes(value) : String(value)));
  }
  section.append(list);
  for (const backup of volume.backups || []) {
    const state = backup.connected ? "connected" : "not connected";
    const error = backup.error ? ": " + backup.error : "";
    section.append(element("p", `backup ${backup.address}: ${state}${error}`));
  }
  for (const snapshot of volume.snapshots || []) {
    const broken = snapshot.broken ? ", broken: " + snapshot.broken : "";
    section.append(element("p",
      `snapshot ${snapshot.snapshot} ${snapshot.label}: preserved ` +
      `${bytes(snapshot.preserved_bytes)}${broken}`));
  }
  return section;
}
function row(job) {
  const made = element("tr");
  const total = job.progress.total_bytes || 0;
  const done = total ? (100 * job.progress.done_bytes / total).toFixed(1) + " %" : "";
  for (const cell of [job.job, job.verb, job.volume, job.state, done, job.seconds.toFixed(1),
                      job.error || ""]) {
    made.append(element("td", String(cell)));
  }
  return made;
}
const source = new EventSource("/events");
source.onmessage = (event) => {
  const status = JSON.parse(event.data);
  document.getElementById("node").textContent =
    `version ${status.version}, up ${Math.round(status.seconds_up)} s, link sent ` +
    `${bytes(status.link_bytes_sent)}, received ${bytes(status.link_bytes_received)}`;
  document.getElementById("volumes").replaceChildren(...status.volumes.map(show));
  document.getElementById("jobs").replaceChildren(...status.jobs.map(row));
};
source.onerror = () => {
  document.getElementById("node").textContent = "the daemon does not answer";
};
"""
