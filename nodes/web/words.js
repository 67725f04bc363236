// What nodes say, the notes and titles of templates and the choices of widgets, in the page's language. The host sends
// English, which is kept, saved and run; it is translated where it is shown, by the table of words.json.
import { app } from "../../scripts/app.js";
import { Phrasebook } from "./phrasebook.js";

const SETTING = "Comfy.Locale";
const LANGUAGES = ["zh", "zh-TW", "ja", "ko"]; // of the table, and of locales/

let book = null; // in English, and in any language that the table has not
const listeners = []; // called when the language has changed

export const language = () => book?.language ?? "en";
export const inWords = (text) => (book ? text.split("\n").map((line) => book.line(line)).join("\n") : text);
export const noteInWords = (text) => book?.note(text) ?? null;
export const titleInWords = (text) => book?.title(text) ?? null;
export const choiceInWords = (value) => book?.choice(value) ?? value;
export const onLanguage = (listener) => listeners.push(listener);

async function open(name) {
  try {
    book = LANGUAGES.includes(name) ? new Phrasebook(await table(), name) : null;
  } catch (error) {
    console.warn("phased-consistency: what nodes say stays in English.", error);
  }
  for (const listener of listeners) listener();
}

// The host gives no age to a .json, which another version of the pack may have replaced.
async function table() {
  const answer = await fetch(new URL("./words.json", import.meta.url), { cache: "no-cache" });
  return answer.json();
}

app.registerExtension({
  name: "phased-consistency.words",
  async setup() {
    app.ui?.settings?.addEventListener(`${SETTING}.change`, ({ detail }) => open(detail.value));
    await open(app.extensionManager?.setting.get(SETTING));
  },
});
