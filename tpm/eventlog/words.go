package eventlog

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"

	"github.com/google/go-eventlog/tcg"
	"github.com/google/go-eventlog/wellknown"
)

// maxText bounds in bytes what is shown of a text from a log.
const maxText = 1024

const subjectSecureBoot = "Secure Boot"

// describe puts an event into words. What cannot be read is named by its type.
func describe(e tcg.Event) Event {
	d := Event{Type: e.Type.TCGString(), Digest: e.Digest, Measured: hashes(e.Digest, e.Data)}
	switch e.Type {
	case tcg.Separator:
		d.Subject = "end of the firmware's own part"
		if !bytes.Equal(e.Data, make([]byte, 4)) {
			d.Subject, d.Detail = "the firmware reports an error", fmt.Sprintf("%.8x", e.Data)
		}
	case tcg.SCRTMVersion:
		d.Subject, d.Detail = "firmware version", text(e.Data)
		if len(e.Data) == 16 && strings.HasSuffix(d.Detail, " bytes") {
			d.Detail = guid(e.Data)
		}
	case tcg.EFIVariableDriverConfig, tcg.EFIVariableBoot, tcg.EFIVariableBoot2, tcg.EFIVariableAuthority:
		describeVariable(&d, e)
	case tcg.EFIBootServicesApplication, tcg.EFIBootServicesDriver, tcg.EFIRuntimeServicesDriver:
		describeImage(&d, e)
	case tcg.EFIGPTEvent:
		d.Subject, d.Detail = "partition table", partitions(e.Data)
	case tcg.EFIPlatformFirmwareBlob, tcg.EFIPlatformFirmwareBlob2:
		describeBlob(&d, e)
	case tcg.EFIHandoffTables, tcg.EFIHandoffTables2:
		d.Subject = "tables of the firmware (SMBIOS, ACPI)"
	case tcg.Ipl:
		describeLoader(&d, e)
	case tcg.EventTag:
		d.Subject = "kernel"
		if len(e.Data) > 8 {
			d.Subject += ": " + text(e.Data[8:]) // TCG_PCClientTaggedEvent: id, size, data
		}
	default:
		d.Subject, d.Detail = kind(e.Type), text(e.Data)
		if !d.Measured {
			d.Subject, d.Detail = d.Subject+": "+d.Detail, "" // a name
		}
	}
	return d
}

func hashes(digest, data []byte) bool {
	h := sha256.Sum256(data)
	return bytes.Equal(digest, h[:])
}

func kind(t tcg.EventType) string {
	if name, ok := t.KnownName(); ok {
		return name
	}
	return fmt.Sprintf("event of type %#x", uint32(t))
}

// Prefixes that GRUB puts before what it has measured: its manual, section Measured
// Boot; the second form is Fedora's of before.
var grub = []struct{ prefix, subject string }{
	{"grub_cmd: ", "GRUB command"}, {"kernel_cmdline: ", "kernel command line"}, {"module_cmdline: ", "module command line"},
	{"grub_cmd ", "GRUB command"}, {"grub_kernel_cmdline ", "kernel command line"},
}

// describeLoader is for EV_IPL: GRUB, shim, systemd-stub and systemd-boot use it.
func describeLoader(d *Event, e tcg.Event) {
	for _, g := range grub {
		if said, ok := bytes.CutPrefix(e.Data, []byte(g.prefix)); ok {
			d.Subject, d.Detail = g.subject, text(said)
			d.Measured = hashes(e.Digest, said) || hashes(e.Digest, bytes.TrimSuffix(said, []byte{0}))
			return
		}
	}
	if d.Measured {
		d.Subject, d.Detail = "text of the boot loader", text(e.Data)
		return
	}
	d.Subject = "named by the boot loader: " + text(e.Data)
}

func variable(e tcg.Event) (tcg.UEFIVariableData, error) {
	switch e.Type {
	case tcg.EFIVariableDriverConfig, tcg.EFIVariableBoot, tcg.EFIVariableBoot2, tcg.EFIVariableAuthority:
		return tcg.ParseUEFIVariableData(bytes.NewReader(e.Data))
	}
	return tcg.UEFIVariableData{}, errors.New("no event of a variable")
}

var keyLists = map[string]string{
	"PK":  "owner's key of Secure Boot (PK)",
	"KEK": "keys that may change Secure Boot's lists (KEK)",
	"db":  "keys and images that Secure Boot allows (db)",
	"dbx": "keys and images that Secure Boot forbids (dbx)",
}

func describeVariable(d *Event, e tcg.Event) {
	v, err := variable(e)
	if err != nil {
		d.Subject = "unreadable variable of the firmware"
		return
	}
	// Firmware of before hashes the value only, and shim has a byte too many in some events.
	d.Measured = d.Measured || hashes(e.Digest, v.VariableData) ||
		e.Type == tcg.EFIVariableAuthority && len(e.Data) > 0 && hashes(e.Digest, e.Data[:len(e.Data)-1])
	name := v.VarName()
	switch {
	case e.Type == tcg.EFIVariableAuthority:
		d.Subject, d.Detail = "allowed by "+printable(name), authority(v.VariableData)
	case name == "SecureBoot":
		d.Subject, d.Detail = subjectSecureBoot, "off"
		if bytes.Equal(v.VariableData, []byte{1}) {
			d.Detail = "on"
		}
	case keyLists[name] != "":
		d.Subject, d.Detail = keyLists[name], signatures(v.VariableData)
	case name == "BootOrder":
		var order []string
		for b := v.VariableData; len(b) >= 2; b = b[2:] {
			order = append(order, fmt.Sprintf("%04X", binary.LittleEndian.Uint16(b)))
		}
		d.Subject, d.Detail = "order of boot options", printable(strings.Join(order, ", "))
	case len(name) == 8 && strings.HasPrefix(name, "Boot"):
		d.Subject, d.Detail = "boot option "+printable(name[4:]), bootOption(v.VariableData)
	default:
		d.Subject, d.Detail = "variable "+printable(name), fmt.Sprintf("%d bytes", len(v.VariableData))
	}
}

// authority is what allowed an image: a certificate with its owner before it, or a
// text of shim's.
func authority(b []byte) string {
	for _, der := range [][]byte{b[min(16, len(b)):], b} {
		if c, err := x509.ParseCertificate(der); err == nil {
			return certificate(c)
		}
	}
	return text(b)
}

// bootOption reads an EFI_LOAD_OPTION: UEFI 2.10, section 3.1.3.
func bootOption(b []byte) string {
	if len(b) < 6 {
		return fmt.Sprintf("%d bytes", len(b))
	}
	pathLen, rest := int(binary.LittleEndian.Uint16(b[4:])), b[6:]
	end := 0
	for end+1 < len(rest) && (rest[end] != 0 || rest[end+1] != 0) {
		end += 2
	}
	name := text(rest[:min(end, len(rest))])
	rest = rest[min(end+2, len(rest)):]
	if pathLen > len(rest) {
		return name
	}
	return name + ", " + devicePath(rest[:pathLen])
}

func describeImage(d *Event, e tcg.Event) {
	d.Measured = false // its digest is of the image
	what := map[tcg.EventType]string{
		tcg.EFIBootServicesApplication: "program ", tcg.EFIBootServicesDriver: "driver ", tcg.EFIRuntimeServicesDriver: "runtime driver ",
	}[e.Type]
	if e.Index == 4 && e.Type == tcg.EFIBootServicesApplication {
		what = "boot loader or kernel "
	}
	image, err := tcg.ParseEFIImageLoad(bytes.NewReader(e.Data))
	if err != nil {
		d.Subject = what + "(unreadable)"
		return
	}
	d.Subject = what + devicePath(image.DevPathData)
}

// devicePath names the file at the end of a device path: UEFI 2.10, section 10.3.
func devicePath(b []byte) string {
	elements, err := (&tcg.EFIImageLoad{DevPathData: b}).DevicePath()
	if err != nil {
		return "(unreadable path)"
	}
	var files []string
	var pci, rom, net bool
	for _, e := range elements {
		switch {
		case e.Type == tcg.MediaDevice && e.Subtype == 4:
			files = append(files, text(e.Data))
		case e.Type == tcg.MediaDevice && e.Subtype == 6 && len(e.Data) == 16:
			files = append(files, "file "+guid(e.Data)+" of the firmware")
		case e.Type == tcg.MediaDevice && e.Subtype == 8:
			rom = pci
		case e.Type == tcg.HardwareDevice && e.Subtype == 1:
			pci = true
		case e.Type == tcg.MessagingDevice && e.Subtype == 24:
			files = append(files, text(e.Data)) // URI
		case e.Type == tcg.MessagingDevice && e.Subtype == 11: // MAC address
			net = true
		}
	}
	switch {
	case len(files) > 0:
		return printable(strings.Join(files, " "))
	case rom:
		return "in an option ROM of a PCI device"
	case net:
		return "from the network"
	}
	return "(no path)"
}

func describeBlob(d *Event, e tcg.Event) {
	d.Subject, d.Measured = "firmware code", false
	b := e.Data
	if e.Type == tcg.EFIPlatformFirmwareBlob2 && len(b) > 0 { // a described one
		n := min(int(b[0]), len(b)-1)
		d.Subject += ", " + text(b[1:1+n])
		b = b[1+n:]
	}
	if len(b) == 16 {
		d.Subject += fmt.Sprintf(" at %#x, %d bytes", binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[8:]))
	}
}

// partitions reads a UEFI_GPT_DATA: TCG PC Client Platform Firmware Profile, section
// 10.4.4; the header is that of UEFI 2.10, section 5.3.2.
func partitions(b []byte) string {
	if len(b) < 100 {
		return fmt.Sprintf("%d bytes", len(b))
	}
	return fmt.Sprintf("%d partitions, disk %s", binary.LittleEndian.Uint64(b[92:]), guid(b[56:72]))
}

func guid(b []byte) string {
	return fmt.Sprintf("%08x-%04x-%04x-%x-%x", binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint16(b[4:]), binary.LittleEndian.Uint16(b[6:]), b[8:10], b[10:16])
}

// signatureCount is what is in EFI_SIGNATURE_LISTs: UEFI 2.10, section 32.4.1.
type signatureCount struct {
	certificates  []*x509.Certificate
	hashes, other int
}

const (
	typeX509   = "a5c059a1-94e4-4aa7-87b5-ab155c2bf072"
	typeSHA256 = "c1c41626-504c-4092-aca9-41f936934328"
)

func parseSignatures(b []byte) (*signatureCount, error) {
	s := &signatureCount{}
	bad := errors.New("malformed list of Secure Boot's keys")
	for len(b) > 0 {
		if len(b) < 28 {
			return nil, bad
		}
		size, head, each := uint64(binary.LittleEndian.Uint32(b[16:])), uint64(binary.LittleEndian.Uint32(b[20:])), uint64(binary.LittleEndian.Uint32(b[24:]))
		if size < 28+head || size > uint64(len(b)) || each <= 16 || (size-28-head)%each != 0 {
			return nil, bad
		}
		for entry := b[28+head : size]; len(entry) > 0; entry = entry[each:] {
			switch guid(b) {
			case typeX509:
				c, err := x509.ParseCertificate(entry[16:each])
				if err != nil {
					return nil, bad
				}
				s.certificates = append(s.certificates, c)
			case typeSHA256:
				s.hashes++
			default:
				s.other++
			}
		}
		b = b[size:]
	}
	return s, nil
}

func signatures(b []byte) string {
	s, err := parseSignatures(b)
	if err != nil {
		return err.Error()
	}
	var names []string
	for _, c := range s.certificates {
		names = append(names, certificate(c))
	}
	out := fmt.Sprintf("%d certificates", len(names))
	if len(names) > 0 {
		out += " (" + strings.Join(names, "; ") + ")"
	}
	out += fmt.Sprintf(", %d images", s.hashes)
	if s.other > 0 {
		out += fmt.Sprintf(", %d of other kinds", s.other)
	}
	return printable(out)
}

// known are certificates that go-eventlog has: others only carry a name.
var known = []struct {
	der  []byte
	name string
}{
	{wellknown.WindowsProductionPCA2011Cert, "Microsoft Windows Production PCA 2011"},
	{wellknown.MicrosoftUEFICA2011Cert, "Microsoft UEFI CA 2011, for other makers' boot loaders"},
	{wellknown.MicrosoftKEKCA2011Cert, "Microsoft KEK CA 2011"},
	{wellknown.GceDefaultPKCert, "Google Compute Engine's default PK"},
	{wellknown.RevokedCanonicalBootholeCert, "Canonical's, revoked for BootHole"},
	{wellknown.RevokedDebianBootholeCert, "Debian's, revoked for BootHole"},
	{wellknown.RevokedCiscoCert, "Cisco's, revoked for BootHole"},
}

func certificate(c *x509.Certificate) string {
	for _, k := range known {
		if bytes.Equal(c.Raw, k.der) {
			return k.name
		}
	}
	name := c.Subject.CommonName
	if name == "" {
		name = c.Subject.String()
	}
	return fmt.Sprintf("%q, unknown, SHA-256 %.8x…", printable(name), sha256.Sum256(c.Raw))
}

// text shows bytes as the text that they are, in UTF-16 or UTF-8, or says how many.
func text(b []byte) string {
	s := string(b)
	if len(b) >= 2 && b[0] != 0 && b[1] == 0 {
		units := make([]uint16, len(b)/2)
		for i := range units {
			units[i] = binary.LittleEndian.Uint16(b[2*i:])
		}
		s = string(utf16.Decode(units))
	}
	s = strings.TrimRight(s, "\x00\r\n ")
	bad, all := 0, 0
	for _, r := range s {
		all++
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			bad++
		}
	}
	if bad*4 > all || all == 0 {
		return fmt.Sprintf("%d bytes", len(b))
	}
	return printable(s)
}

// printable bounds a text from a log, and replaces what would upset a terminal or turn
// the direction of a line: whoever boots the host may write it.
func printable(s string) string {
	var b strings.Builder
	for i, r := range s {
		if b.Len() >= maxText {
			fmt.Fprintf(&b, "… and %d bytes more", len(s)-i)
			break
		}
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			r = '.'
		}
		b.WriteRune(r)
	}
	return b.String()
}
