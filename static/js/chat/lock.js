/** What only one window of the browser may do at a time. */

/**
 * Have an answer for this window alone; wait while another one has it.
 *
 * @param {AbortSignal} signal ends the waiting
 * @returns {Promise<{release: () => void} | null>} null: the waiting was ended
 */
export async function lock(name, signal) {
  if (!navigator.locks) return { release() {} }; // on http: pages of other machines do without
  return new Promise((resolve) => {
    const held = () => new Promise((release) => resolve({ release }));
    navigator.locks.request(name, { signal }, held).catch(() => resolve(null));
  });
}
