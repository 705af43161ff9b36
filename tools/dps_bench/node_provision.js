// Microsoft's client for Node registers with a TPM, over HTTPS; it keeps the hub's key in the TPM, as it always does.
// argv: the folder that has node_modules, and an order as JSON: registrationId, tpmPort (bytes of commands and answers
// on TCP, as swtpm has them), port and caFile of DPS on this machine. Exit status 1: it was not assigned.
"use strict";
const fs = require("fs");
const net = require("net");
const tls = require("tls");

const [folder, text] = process.argv.slice(2);
const order = JSON.parse(text);
const from = (name) => require(require.resolve(name, { paths: [folder] }));

// The client's port is fixed in its code.
const connect = tls.connect;
tls.connect = (options, ...rest) =>
  connect({ ...options, host: "127.0.0.1", port: order.port, ca: fs.readFileSync(order.caFile), path: undefined }, ...rest);

class PlainTcp {
  connect(done) {
    this.socket = net.connect(order.tpmPort, "127.0.0.1", () => done(null));
    return null;
  }

  dispatchCommand(command, done) {
    let answer = Buffer.alloc(0);
    const read = (more) => {
      answer = Buffer.concat([answer, more]);
      if (answer.length >= 10 && answer.length >= answer.readUInt32BE(2)) {
        this.socket.off("data", read);
        setImmediate(done, null, answer);
      }
    };
    this.socket.on("data", read);
    this.socket.write(command);
  }

  close() {
    this.socket.end();
  }
}

const { ProvisioningDeviceClient } = from("azure-iot-provisioning-device");
const { Http } = from("azure-iot-provisioning-device-http");
const { TpmSecurityClient } = from("azure-iot-security-tpm");
const { Tpm } = from("tss.js");

const tpm = new Tpm(false);
tpm.device = new PlainTcp();
const security = new TpmSecurityClient(order.registrationId, tpm);
const client = ProvisioningDeviceClient.create("localhost", "0ne00000000", new Http(), security);
client.register((refused, answer) => {
  const hub = refused ? null : answer.registrationState.assignedHub;
  if (!hub) {
    console.error(String(refused || "no hub was assigned"));
  }
  process.exit(hub ? 0 : 1);
});
