/** Work that can wait until the page has nothing better to do, in small pieces. */

const LIMIT_MS = 200; // after which it is done however busy the page is
const tasks = [];

/** @param {() => void} task */
export function whenIdle(task) {
  tasks.push(task);
  if (tasks.length === 1) schedule();
}

function schedule() {
  // Safari has no idle callbacks.
  if (window.requestIdleCallback) requestIdleCallback(run, { timeout: LIMIT_MS });
  else setTimeout(run, 16);
}

function run(deadline) {
  do {
    try {
      tasks[0]();
    } catch (error) {
      console.warn("left as it was", error);
    }
    tasks.shift();
  } while (tasks.length && deadline?.timeRemaining() > 2);
  if (tasks.length) schedule();
}
