// Nodes say what they do while they run (`show` in nodes/host.py), and the frontend writes it on them. It forgets it when a
// graph is drawn anew: after a change of tab, in a subgraph, after the page is loaded again. It writes on whatever tab is
// open. And a result from the host's cache says nothing. Here the last text of each of our nodes is kept as long as its
// tab is, and written where it belongs.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { WARNING, addSentences, isOurs, sentencesOn } from "./sentences.js";
import { inWords } from "./words.js";

const KEY = "phased-consistency.tabs"; // in the browser's session
const MOST_LETTERS = 500; // of a line of what a node has failed with
const LIFE = 20000; // milliseconds that a warning is shown in App Mode
const MOST = 1000; // tabs, and prompts of a tab, that are kept
const NO_ID = "00000000-0000-0000-0000-000000000000"; // of a graph until it is drawn anew; for a moment, of any

// A tab is { path, id, said, prompts }: where its workflow is kept and its graph's id; node -> [type, what it said last,
// whether that is what it failed with]; prompt that has not ended -> its nodes of ours, node -> type. "5:3" is node 3 in
// the subgraph that is node 5.
const tabs = new Map(); // workflow that is open -> its tab
let others = []; // tabs that are not open: closed, or not opened since the page was loaded again
const notified = new Set(); // warnings of the run under way that were shown in App Mode
let running = null; // the prompt that the host is at
let loads = 0; // of graphs, that have not ended: the graph that is there may not be the active tab's
let queueing = Promise.resolve(); // until the host has answered all that was queued

const root = () => app.rootGraph ?? app.graph; // older frontends have the latter
const nodeAt = (id) => id.split(":").reduce((at, number) => (at?.subgraph ?? at)?.getNodeById?.(number), root());
const activeTab = () => tabs.get(app.extensionManager?.workflow.activeWorkflow);
const isOpen = (tab) => !loads && tab === activeTab();
const tabOf = (prompt) => [...tabs.values(), ...others].find((tab) => prompt in tab.prompts);
const isOf = (tab, id) => tab.id === id || [tab.id, id].includes(NO_ID);
const forget = (tab) => Object.assign(tab, { said: {}, prompts: {} });

// Tabs are closed, saved under other names, and given other graphs.
function follow() {
  const { activeWorkflow, openWorkflows } = app.extensionManager?.workflow ?? { openWorkflows: [] };
  const open = new Set([activeWorkflow, ...openWorkflows]);
  for (const [workflow, tab] of tabs)
    if (!open.has(workflow)) {
      others.push(Object.assign(tab, { path: null, said: {} })); // it may still have something queued
      tabs.delete(workflow);
    }
  for (const workflow of open) {
    if (!workflow?.activeState) continue; // it has not been opened since the page was loaded
    const { path } = workflow;
    const { id } = workflow.activeState;
    const tab = tabs.get(workflow) ?? others.find((each) => each.path === path && isOf(each, id)) ?? forget({ id });
    if (!isOf(tab, id)) forget(tab);
    tabs.set(workflow, Object.assign(tab, { path, id }));
    others = others.filter((each) => each !== tab);
  }
}

// Write on a node as the frontend itself does. `again` tells it from what the host sends.
function write(nodeId, text) {
  const node = nodeAt(nodeId);
  if (isOurs(node)) addSentences(node); // a node that says nothing may have failed
  api.dispatchCustomEvent("progress_text", { nodeId, text, again: true });
}

function erase(node) {
  const widget = sentencesOn(node);
  if (!widget) return;
  if (isOurs(node)) return void (widget.value = "");
  widget.onRemove?.(); // the frontend's own, on a node of another kind
  node.widgets.splice(node.widgets.indexOf(widget), 1);
}

function writeAll() {
  if (loads) return;
  follow();
  for (const [id, [type, text]] of Object.entries(activeTab()?.said ?? {})) {
    const node = nodeAt(id);
    // Of the graph that is shown, which may be a subgraph; older frontends cannot write there.
    const isShown = node?.graph === app.canvas.graph && (app.rootGraph || !id.includes(":"));
    if (isShown && node.type === type) write(id, text);
  }
}

function keep(tab, id, type, text, failed = false) {
  tab.said[id] = [type, text, failed];
  store();
  if (isOpen(tab)) notify(id, text);
}

// Where the graph is hidden, as in App Mode, show a node's warnings beside the pictures, each text once in a run.
function notify(id, text) {
  const { activeMode, initialMode } = app.extensionManager?.workflow.activeWorkflow ?? {};
  const warnings = text.split("\n").filter((line) => line.startsWith(WARNING));
  const key = `${id}\n${warnings.join("\n")}`;
  if ((activeMode ?? initialMode) !== "app" || !warnings.length || notified.has(key)) return;
  notified.add(key);
  const detail = warnings.map((line) => inWords(line.slice(WARNING.length))).join("\n");
  app.extensionManager.toast.add({ severity: "warn", summary: nodeAt(id)?.title, detail, life: LIFE });
}

// What a node has failed with takes the place of its sentences, which are of an earlier run, until the next one starts.
function fail(tab, id, type, lines) {
  if (!type?.startsWith("PCM")) return;
  const text = lines.map((line) => WARNING + line.slice(0, MOST_LETTERS)).join("\n");
  keep(tab, id, type, text, true);
  if (isOpen(tab)) write(id, text);
}

// Ours are sentences; others may be no more than a number.
function linesOf({ exception_type, exception_message }) {
  const message = `${exception_message ?? ""}`.trim();
  return (exception_type === "ValueError" && message ? message : `${exception_type}: ${message}`).split("\n");
}

function dropFailures(tab, ids) {
  notified.clear();
  for (const id of ids) {
    if (!tab.said[id]?.[2]) continue;
    delete tab.said[id];
    if (isOpen(tab)) erase(nodeAt(id));
  }
  store();
}

function store() {
  try {
    sessionStorage.setItem(KEY, JSON.stringify([...tabs.values(), ...others].slice(0, MOST)));
  } catch (error) {
    console.warn("phased-consistency: what nodes say is not kept for when the page is loaded again.", error);
  }
}

function restore() {
  try {
    others = JSON.parse(sessionStorage.getItem(KEY) ?? "[]");
  } catch (error) {
    console.warn("phased-consistency: what nodes said before cannot be read.", error);
  }
}

// Note that the active tab has queued a graph, { output }, and the prompt's id once the host has answered.
async function note({ output }, answer) {
  follow();
  const tab = activeTab();
  const types = Object.entries(output).map(([id, node]) => [id, node.class_type]);
  dropFailures(tab, Object.keys(output));
  const { prompt_id, node_errors } = await answer.catch((error) => error?.response ?? {});
  for (const [id, { class_type, errors }] of Object.entries(node_errors ?? {})) // of what the host refuses to run
    fail(tab, id, class_type, errors.map(({ message, details }) => `${message}: ${details}`));
  if (!prompt_id) return;
  tab.prompts[prompt_id] = Object.fromEntries(types.filter(([, type]) => type?.startsWith("PCM")));
  for (const oldest of Object.keys(tab.prompts).slice(0, -MOST)) delete tab.prompts[oldest];
  store();
}

// The text among a node's outputs, after the warnings of samplers that ran its model: those of this prompt, else, since
// nothing has run for a result from the cache, the last ones.
function textOf(output, prompt) {
  const later = (output?.warnings ?? []).flatMap((runs) => new Map(runs).get(prompt) ?? runs.at(-1)?.[1] ?? []);
  const lines = [...later.map((line) => WARNING + line), ...(output?.text ?? []).join("\n").split("\n")];
  return [...new Set(lines)].join("\n");
}

// Deal with the host's news of what tabs here have queued, after the frontend has. They may come before its answer with
// the prompt's id; and other browsers' come here, too.
function onNews(event, deal) {
  api.addEventListener(event, async ({ detail }) => {
    const prompt = detail.prompt_id ?? running;
    await (tabOf(prompt) ? null : queueing);
    follow();
    const tab = tabOf(prompt);
    if (tab && !detail.again) deal(tab, prompt, detail);
  });
}

// The first is not heard where the page is loaded again during a run.
for (const event of ["execution_start", "progress_state"])
  api.addEventListener(event, ({ detail }) => void (running = detail.prompt_id));

onNews("progress_text", (tab, prompt, { nodeId, text }) => {
  const type = tab.prompts[prompt][nodeId];
  if (type) keep(tab, nodeId, type, text);
  if (isOpen(tab)) return;
  erase(nodeAt(nodeId)); // on which the frontend has written what another tab's node says
  writeAll();
});

onNews("executed", (tab, prompt, detail) => {
  const id = `${detail.display_node ?? detail.node}`;
  const type = tab.prompts[prompt][id];
  const text = textOf(detail.output, prompt);
  if (!type || !text) return;
  keep(tab, id, type, text);
  if (isOpen(tab)) write(id, text);
});

onNews("execution_error", (tab, prompt, detail) => {
  const id = `${detail.node_id}`;
  fail(tab, id, tab.prompts[prompt][id], linesOf(detail));
});

for (const event of ["execution_success", "execution_error", "execution_interrupted"])
  onNews(event, (tab, prompt) => {
    delete tab.prompts[prompt];
    store();
  });

api.addEventListener("graphCleared", () => {
  if (activeTab() && !root().nodes.length) forget(activeTab()); // else a subgraph alone was cleared
});

app.registerExtension({
  name: "phased-consistency.text",
  setup() {
    restore();
    const queuePrompt = api.queuePrompt;
    api.queuePrompt = function (...given) {
      const answer = queuePrompt.apply(this, given);
      queueing = Promise.allSettled([queueing, note(given[1], answer)]);
      return answer;
    };
    const loadGraphData = app.loadGraphData;
    app.loadGraphData = async function (...given) {
      follow(); // before a workflow that was closed is open again
      loads += 1;
      try {
        return await loadGraphData.apply(this, given);
      } finally {
        loads -= 1;
        requestAnimationFrame(writeAll);
      }
    };
    const loadApiJson = app.loadApiJson;
    app.loadApiJson = async function (...given) {
      await loadApiJson.apply(this, given);
      await new Promise((resolve) => setTimeout(resolve)); // older frontends open its tab after they have returned
      follow();
      if (activeTab()) forget(activeTab()); // which may be the one that was open before
    };
    app.canvas?.canvas?.addEventListener("litegraph:set-graph", () => requestAnimationFrame(writeAll));
    addEventListener("pagehide", () => {
      follow();
      store();
    });
  },
});
