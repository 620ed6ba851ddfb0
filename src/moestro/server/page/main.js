// Puts the page together; asks for a key where the server wants one.

import { key } from "./api.js";
import { startChat } from "./chat.js";
import { startRoom } from "./room.js";

const dialog = document.getElementById("key-dialog");
let dismissed = false;

function openDialog() {
  dialog.returnValue = "";
  if (!dialog.open) dialog.showModal();
}

/** Once by itself, and again after a key that was wrong; whoever closes it has the button. */
function askForKey() {
  document.getElementById("key-open").hidden = false;
  if (!dismissed) openDialog();
}

dialog.addEventListener("close", () => {
  dismissed = dialog.returnValue !== "use";
  if (!dismissed) key.set(document.getElementById("key").value.trim());
});
document.getElementById("key-open").addEventListener("click", openDialog);

startChat();
startRoom(askForKey);
document.getElementById("question").focus();
