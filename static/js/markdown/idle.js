/** Work that can wait until the page has nothing better to do, in small pieces. */

const LIMIT_MS = 200; // after which it is done however busy the page is
const tasks = [];

/**
 * @param {() => void} task
 * @param {() => void} after called when this task, and others that were done along with it, have changed the page
 */
export function whenIdle(task, after) {
  tasks.push({ task, after });
  if (tasks.length === 1) schedule();
}

function schedule() {
  // Safari has no idle callbacks.
  if (window.requestIdleCallback) requestIdleCallback(run, { timeout: LIMIT_MS });
  else setTimeout(run, 16);
}

function run(deadline) {
  const afterwards = new Set();
  do {
    const { task, after } = tasks.shift();
    try {
      task();
      afterwards.add(after);
    } catch (error) {
      console.warn("left as it was", error);
    }
  } while (tasks.length && deadline?.timeRemaining() > 4);
  if (tasks.length) schedule();
  for (const after of afterwards) after();
}
