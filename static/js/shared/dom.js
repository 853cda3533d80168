/** Small helpers to build the page. Text enters it as text and never as markup. */

const SVG = "http://www.w3.org/2000/svg";

export const $ = (id) => document.getElementById(id);

/** @param {object} [properties] of the element, such as textContent; `data` goes to its dataset */
export function element(tag, { data = {}, ...properties } = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  Object.assign(node.dataset, data);
  node.append(...children);
  return node;
}

/** One of the drawings at the head of index.html. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.classList.add("icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

/** A button that shows only a drawing; its label is its name and its hint. */
export function iconButton(name, label, action) {
  const button = element("button", { type: "button", className: "plain small", title: label, ariaLabel: label }, icon(name));
  button.addEventListener("click", action);
  return button;
}

export function textButton(label, action, className = "quiet") {
  const button = element("button", { type: "button", className, textContent: label });
  button.addEventListener("click", action);
  return button;
}

/** Set a text only if it is another one: what has not changed is neither drawn nor read out again. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Whether a key belongs to an input method that composes a character. (Safari says so with the key code alone.) */
export function isComposing(event) {
  return event.isComposing || event.keyCode === 229;
}

/** Whether a key is an Escape that closes or ends nothing yet: no dialog, menu, search or composition. */
export function isFreeEscape(event) {
  const taken = event.defaultPrevented || isComposing(event) || document.querySelector("dialog[open], :popover-open");
  return event.key === "Escape" && !taken && !event.target.matches("[type=search]:not(:placeholder-shown)");
}

export function pageConfig() {
  return JSON.parse($("config").textContent);
}
