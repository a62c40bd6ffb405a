// The worker: messages in, answers out.

import { createQueue } from "./queue.js";

const take = createQueue((answer) => self.postMessage(answer));
self.onmessage = (event) => take(event.data);
self.postMessage("started");
