/** The page that asks for a key before there is another one. */

import { KeyForm } from "./key.js";

document.body.dataset.state = "current";
new KeyForm(() => location.reload());
