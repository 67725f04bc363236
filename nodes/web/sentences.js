// The place on our nodes where their sentences stand: lines stay lines, words stay whole, warnings are marked, and the node
// is as tall as they are. It has the name of the frontend's own widget for such text, which therefore writes into it.
import { app } from "../../scripts/app.js";
import { inWords, language, onLanguage } from "./words.js";

export const PREVIEW = "$$node-text-preview"; // the frontend's name
export const WARNING = "⚠ "; // as in nodes/host.py
const MARGIN = 10; // pixels around a widget's element, as the frontend has it
const EMPTY = "\n"; // two lines are kept free for a node that has said nothing yet
const STYLE = `
.pcm-sentences {
  box-sizing: border-box; padding: 4px 6px; overflow: hidden; color: var(--input-text, #ddd);
  font: 12px/16px Inter, sans-serif; white-space: pre-wrap; overflow-wrap: break-word; word-break: normal;
  user-select: text; cursor: text;
}
.pcm-sentences div { min-height: 16px; }
.pcm-sentences:lang(ko) { word-break: keep-all; }
.pcm-sentences .pcm-warning {
  margin-bottom: 2px; padding: 2px 6px; border-left: 3px solid #f59e0b; border-radius: 2px;
  background: color-mix(in srgb, #f59e0b 20%, transparent); font-weight: 600;
}
.pcm-ruler { position: absolute; visibility: hidden; left: 0; top: 0; }`;

const ruler = document.createElement("div");

export const isOurs = (node) => (node?.type || node?.constructor.comfyClass)?.startsWith("PCM"); // new ones have no type
export const sentencesOn = (node) => node?.widgets?.find((widget) => widget.name === PREVIEW);

function lineOf(text) {
  const line = document.createElement("div");
  line.textContent = text;
  if (text.startsWith(WARNING)) line.className = "pcm-warning";
  return line;
}

// The height that lines take in an element of this width.
function heightOf(text, width) {
  const copy = document.createElement("div");
  copy.className = "pcm-sentences";
  copy.lang = language();
  copy.style.width = `${width}px`;
  copy.append(...text.split("\n").map(lineOf));
  ruler.replaceChildren(copy);
  const height = copy.offsetHeight;
  ruler.replaceChildren();
  return height;
}

// Give a node the widget, unless it has it.
export function addSentences(node) {
  if (sentencesOn(node)) return;
  const element = document.createElement("div");
  element.className = "pcm-sentences";
  element.setAttribute("role", "status");

  let text = ""; // in English, as the host has sent it
  let shown = ""; // in the page's language
  let measured = {}; // the width and the text of the last measurement, and its height
  let grown = null; // heights of the node before it was made taller for its text, and since

  function height() {
    const width = node.size[0] - 2 * MARGIN;
    if (measured.width !== width || measured.text !== shown)
      measured = { width, text: shown, height: heightOf(shown || EMPTY, width) + 2 * MARGIN };
    return measured.height;
  }

  function fit() {
    if (globalThis.LiteGraph?.vueNodesMode) return; // where the page itself lays out nodes
    const before = grown?.since === node.size[1] ? grown.before : node.size[1];
    const since = Math.max(before, node.computeSize()[1]);
    grown = since > before ? { before, since } : null;
    if (since !== node.size[1]) node.setSize([node.size[0], since]);
  }

  const widget = node.addDOMWidget(PREVIEW, "pcm_sentences", element, {
    getValue: () => text,
    setValue(value) {
      text = `${value}`;
      shown = inWords(text);
      element.lang = language();
      element.replaceChildren(...(shown ? shown.split("\n").map(lineOf) : []));
      fit();
      node.setDirtyCanvas?.(true, true);
    },
    getMinHeight: height,
    getMaxHeight: height,
    margin: MARGIN,
    hideOnZoom: false,
    serialize: false,
  });
  widget.serialize = false;

  const { onConfigure } = node;
  node.onConfigure = function (...given) {
    const result = onConfigure?.apply(this, given);
    grown = null;
    requestAnimationFrame(fit);
    return result;
  };
  fit();
}

app.registerExtension({
  name: "phased-consistency.sentences",
  setup() {
    const style = document.createElement("style");
    style.textContent = STYLE;
    document.head.append(style);
    ruler.className = "pcm-ruler";
    document.body.append(ruler);
    onLanguage(() => {
      for (const widget of (app.rootGraph ?? app.graph)?.nodes.filter(isOurs).map(sentencesOn) ?? [])
        if (widget) widget.value = widget.value;
    });
  },
  beforeRegisterNodeDef(type, { name, input }) {
    if (name.startsWith("PCM") && input?.hidden?.unique_id) type.pcmSpeaks = true;
  },
  nodeCreated(node) {
    if (node.constructor.pcmSpeaks) addSentences(node);
  },
});
