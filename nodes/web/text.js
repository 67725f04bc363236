// Nodes say what they do while they run (`show` in nodes/host.py). A result from the host's cache says nothing: the host
// only sends the node's outputs again, and the frontend shows no text among them. Here it does, for our nodes.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const said = new WeakMap(); // node -> the text among its last outputs; null: it has spoken, and no outputs came yet

// "5:3" is node 3 in the subgraph that is node 5
const nodeAt = (id) =>
  `${id}`.split(":").reduce((at, number) => (at?.subgraph ?? at)?.getNodeById?.(number), app.rootGraph ?? app.graph);

api.addEventListener("progress_text", ({ detail }) => {
  const node = nodeAt(detail.nodeId);
  if (node && !said.has(node)) said.set(node, null);
});

api.addEventListener("executed", ({ detail }) => {
  const nodeId = `${detail.display_node ?? detail.node}`;
  const node = nodeAt(nodeId);
  const text = detail.output?.text?.join("\n");
  if (!text || !node?.type?.startsWith("PCM")) return;
  const before = said.get(node);
  said.set(node, text);
  // What it said while it ran may be more than what is kept, so that only a silent node, or another result, is told.
  if (before !== null && before !== text) api.dispatchCustomEvent("progress_text", { nodeId, text });
});
