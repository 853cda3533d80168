/** A button that copies a text and says so. */

const NOTICE_MS = 2_000;

let announcer = null;

/**
 * @param {() => string} getText asked when it is pressed
 * @param {{label?: string, className?: string, name?: string}} options name: the accessible one, if not the label
 * @returns {HTMLButtonElement}
 */
export function copyButton(getText, { label = "Copy", className = "quiet", name = null } = {}) {
  const button = document.createElement("button");
  Object.assign(button, { type: "button", className, textContent: label, ariaLabel: name });
  let timer = 0;
  button.addEventListener("click", async () => {
    const outcome = (await copy(getText())) ? "Copied" : "Could not copy";
    announce((button.textContent = outcome));
    clearTimeout(timer);
    timer = setTimeout(() => announce("", (button.textContent = label)), NOTICE_MS);
  });
  return button;
}

/** Pages on http: have no clipboard but on the machine itself; the old way works there. */
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const focused = document.activeElement;
    const field = document.createElement("textarea");
    Object.assign(field, { value: text, readOnly: true, className: "visually-hidden" });
    document.body.append(field);
    field.select();
    const copied = document.execCommand("copy");
    field.remove();
    focused?.focus();
    return copied;
  }
}

/** Tell those who listen to the page. */
function announce(text) {
  if (!announcer) {
    announcer = document.createElement("div");
    Object.assign(announcer, { className: "visually-hidden", ariaLive: "polite" });
    document.body.append(announcer);
  }
  announcer.textContent = text;
}
