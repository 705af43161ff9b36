// Microsoft's clients for Node register with DPS and send one message to the assigned hub.
// argv: the folder that has node_modules, the transport (http, mqtt, ws), and an order as JSON: registrationId, port (on
// 127.0.0.1), caFile, and key in base64 or certificate and certificateKey, PEM files. Prints one JSON document.
"use strict";
const fs = require("fs");
const tls = require("tls");

const [folder, transport, text] = process.argv.slice(2);
const order = JSON.parse(text);
const from = (name) => require(require.resolve(name, { paths: [folder] }));

// The clients' ports are fixed in their code, and their hosts are names that nobody serves.
const connect = tls.connect;
tls.connect = (...given) => {
  const options = Object.assign({}, given.find((each) => each && typeof each === "object"));
  options.servername = options.servername || options.host;
  Object.assign(options, { host: "127.0.0.1", port: order.port, ca: fs.readFileSync(order.caFile) });
  delete options.path;
  delete options.socket;
  const done = given.find((each) => typeof each === "function");
  return done ? connect(options, done) : connect(options);
};

function end(said) {
  console.log(JSON.stringify(said));
  process.exit(0);
}

const { ProvisioningDeviceClient } = from("azure-iot-provisioning-device");
const transports = {
  http: () => new (from("azure-iot-provisioning-device-http").Http)(),
  mqtt: () => new (from("azure-iot-provisioning-device-mqtt").Mqtt)(),
  ws: () => new (from("azure-iot-provisioning-device-mqtt").MqttWs)(),
};
const shown = order.key
  ? null
  : { cert: fs.readFileSync(order.certificate, "utf8"), key: fs.readFileSync(order.certificateKey, "utf8") };
const security = order.key
  ? new (from("azure-iot-security-symmetric-key").SymmetricKeySecurityClient)(order.registrationId, order.key)
  : new (from("azure-iot-security-x509").X509Security)(order.registrationId, shown);
const host = "global.azure-devices-provisioning.net";
const dps = ProvisioningDeviceClient.create(host, "0ne00000000", transports[transport](), security);

dps.register((refused, assigned) => {
  if (refused) {
    end({ refused: String(refused) });
  }
  const { Client, Message } = from("azure-iot-device");
  const proof = order.key ? `SharedAccessKey=${order.key}` : "x509=true";
  const place = `HostName=${assigned.assignedHub};DeviceId=${assigned.deviceId};${proof}`;
  const hub = Client.fromConnectionString(place, from("azure-iot-device-mqtt").Mqtt);
  if (shown) {
    hub.setOptions(shown);
  }
  hub.open((notOpen) => {
    if (notOpen) {
      end({ refused: String(notOpen) });
    }
    hub.sendEvent(new Message("hello"), (notSent) => {
      end({ assigned: [assigned.assignedHub, assigned.deviceId], sent: notSent ? String(notSent) : true });
    });
  });
});
