// The host lists a pack's templates in the order in which its disk has them, and the template browser shows them so. Ours
// are numbered.
import { api } from "../../scripts/api.js";

const FIRST = "00_demo"; // tells our list, whatever the pack's folder is called

const { getWorkflowTemplates } = api;
api.getWorkflowTemplates = async function (...rest) {
  const templates = await getWorkflowTemplates.apply(this, rest);
  for (const names of Object.values(templates)) if (names.includes(FIRST)) names.sort();
  return templates;
};
