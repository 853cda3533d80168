/**
 * The theme that the user chose: "light", "dark", or none for the system's. A classic script that is loaded in the head,
 * so that no page is drawn in the other theme first; js/chat/main.js changes the choice.
 */
try {
  const theme = localStorage.getItem("theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch (error) {
  console.warn("This browser lets the page keep nothing, so the theme is the system's.", error);
}
