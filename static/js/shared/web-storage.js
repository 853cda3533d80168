/** Small things that the browser keeps, where it is allowed to. */

/** @param {"localStorage" | "sessionStorage"} area */
export function recall(area, key) {
  try {
    return window[area].getItem(key);
  } catch (error) {
    console.warn("This browser lets the page keep nothing.", error);
    return null;
  }
}

/** @param {"localStorage" | "sessionStorage"} area @param {string} value empty: forget it */
export function remember(area, key, value) {
  try {
    if (value) window[area].setItem(key, value);
    else window[area].removeItem(key);
  } catch (error) {
    console.warn("This browser lets the page keep nothing.", error);
  }
}
