// Nodes say what they do while they run (`show` in nodes/host.py), and the frontend writes it on them. It forgets it when a
// graph is drawn anew: after a change of tab, in a subgraph, after the page is loaded again. It writes on whatever tab is
// open. And a result from the host's cache says nothing. Here the last text of each of our nodes is kept as long as the
// browser's tab is, and written where it belongs.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const KEY = "phased-consistency"; // in the browser's session
const MOST = 500; // texts that are kept
const WARNING = "⚠ "; // as in nodes/host.py
const PREVIEW = "$$node-text-preview"; // the frontend's widget
const texts = new Map(); // graph and node, "GRAPH NODE" -> what the node said last
const graphs = new WeakMap(); // workflow -> its graph's name here
const workflows = new Map(); // prompt -> the workflow that it was queued from
let running = null; // the prompt that the host is at

const root = () => app.rootGraph ?? app.graph; // older frontends have the latter
const open = () => app.extensionManager?.workflow?.activeWorkflow ?? app;

// The graph of a workflow that is or was open, by where it is kept and its id: two tabs may hold one graph, and the name
// of an unsaved one is given again. Where it has been saved under another name since, its texts go with it.
function graphOf(workflow) {
  if (workflow !== open()) return graphs.get(workflow);
  const graph = [workflow.path, root()?.id].join();
  const before = graphs.get(workflow);
  if (before !== undefined && before !== graph)
    for (const [key, text] of [...texts])
      if (key.startsWith(`${before} `)) {
        texts.delete(key);
        texts.set(graph + key.slice(before.length), text);
      }
  graphs.set(workflow, graph);
  return graph;
}

// "5:3" is node 3 in the subgraph that is node 5
const nodeAt = (id) =>
  `${id}`.split(":").reduce((at, number) => (at?.subgraph ?? at)?.getNodeById?.(number), root());
const isOurs = (node) => node?.type?.startsWith("PCM");

// Write on a node as the frontend itself does. `again` tells it from what the host sends.
const write = (nodeId, text) => api.dispatchCustomEvent("progress_text", { nodeId, text, again: true });

function erase(node) {
  const index = node?.widgets?.findIndex((widget) => widget.name === PREVIEW) ?? -1;
  if (index < 0) return;
  node.widgets[index].onRemove?.();
  node.widgets.splice(index, 1);
}

function writeAll() {
  const graph = graphOf(open());
  for (const [key, text] of [...texts]) {
    const id = key.slice(graph.length + 1);
    if (!key.startsWith(`${graph} `)) continue;
    const node = nodeAt(id);
    // Of the graph that is shown, which may be a subgraph; older frontends cannot write there.
    if (isOurs(node) && node.graph === app.canvas.graph && (app.rootGraph || !id.includes(":"))) write(id, text);
  }
}

function keep(workflow, id, text) {
  const key = `${graphOf(workflow)} ${id}`;
  texts.delete(key); // so that the latest is the last
  texts.set(key, text);
  for (const oldest of [...texts.keys()].slice(0, -MOST)) texts.delete(oldest);
  store();
}

function store() {
  try {
    sessionStorage.setItem(KEY, JSON.stringify([...texts]));
  } catch (error) {
    console.warn("phased-consistency: what nodes say is not kept for when the page is loaded again.", error);
  }
}

function restore() {
  try {
    for (const [key, text] of JSON.parse(sessionStorage.getItem(KEY) ?? "[]")) texts.set(key, text);
  } catch (error) {
    console.warn("phased-consistency: what nodes said before cannot be read.", error);
  }
}

// The text among a node's outputs, after the warnings of samplers that ran its model: those of this prompt, else, since
// nothing has run for a result from the cache, the last ones.
function textOf(output, prompt) {
  const later = (output?.warnings ?? []).flatMap((runs) => new Map(runs).get(prompt) ?? runs.at(-1)?.[1] ?? []);
  const lines = [...later.map((line) => WARNING + line), ...(output?.text ?? []).join("\n").split("\n")];
  return [...new Set(lines)].join("\n");
}

api.addEventListener("execution_start", ({ detail }) => {
  running = detail.prompt_id;
});

api.addEventListener("progress_text", ({ detail: { nodeId, text, again } }) => {
  if (again) return;
  const workflow = workflows.get(running) ?? open();
  if (workflow === open()) {
    if (isOurs(nodeAt(nodeId))) keep(workflow, nodeId, text);
    return;
  }
  // Of a tab that is not open: the frontend has written it on the node with this id that is.
  keep(workflow, nodeId, text);
  queueMicrotask(() => {
    erase(nodeAt(nodeId));
    writeAll();
  });
});

api.addEventListener("executed", ({ detail }) => {
  const id = `${detail.display_node ?? detail.node}`;
  const workflow = workflows.get(detail.prompt_id) ?? open();
  const text = textOf(detail.output, detail.prompt_id);
  const isOpen = workflow === open();
  // Other packs' nodes have a text among their outputs, too; in a tab that is not open ours cannot be told from them, and
  // are when it is.
  if (!text || (isOpen && !isOurs(nodeAt(id))) || texts.get(`${graphOf(workflow)} ${id}`) === text) return;
  keep(workflow, id, text);
  if (isOpen) write(id, text);
});

app.registerExtension({
  name: "phased-consistency.text",
  setup() {
    restore();
    const queuePrompt = api.queuePrompt;
    api.queuePrompt = async function (...given) {
      const workflow = open();
      graphOf(workflow); // its name, which is not known any more once another tab is open
      const answer = await queuePrompt.apply(this, given);
      if (answer?.prompt_id) workflows.set(answer.prompt_id, workflow);
      return answer;
    };
    app.canvas?.canvas?.addEventListener("litegraph:set-graph", () => requestAnimationFrame(writeAll));
    addEventListener("pagehide", () => {
      graphOf(open());
      store();
    });
  },
  afterConfigureGraph: () => void requestAnimationFrame(writeAll),
});
