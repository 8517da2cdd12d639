package eventlog_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"conseal/testenv"
	"conseal/tpm/eventlog"
	"conseal/tpm/policy"
)

func firmware(t testing.TB, name string) *testenv.EventLog {
	t.Helper()
	l, err := testenv.FirmwareLog(name)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func read(t testing.TB, l *testenv.EventLog) *eventlog.Log {
	t.Helper()
	got, err := eventlog.Read(l.Encode(), l.PCRs())
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// lines are the words for one PCR.
func lines(p *eventlog.PCR) (all []string) {
	for _, e := range p.Events {
		all = append(all, e.String())
	}
	return all
}

// The values are those that go-eventlog's tests have of the machines' quotes.
func TestRealLogs(t *testing.T) {
	for _, test := range []struct {
		name   string
		quoted map[int]string
		on     bool
		words  map[int][]string
	}{
		{"rhel8-uefi", map[int]string{
			0: "24af52a4f429b71a3184a6d64cddad17e54ea030e2aa6576bf3a5a3d8bd3328f", 4: "758a3d35f1b0ff5b135dacd07db0c8132c0ac665d944090d4bf96e66447a245c",
			7: "5fd54361d580eb7592adb8deb236ff35444ceeac7148f24b3de63c041f12b3da", 8: "25c3874041ebd4e9a21b6ed71b624a7bfa99907a8dcea7f129a4c64cbaf5829a",
			9: "d43b2f61eb18b4791812ff5f20ab20e4ef621ba683370bedf5dbdf518b3a8078", 14: "d8f57ebcc1a23cc46832696e1a657f720e1be8f5b405bb7204682114e363b455",
		}, true, map[int][]string{
			0: {"firmware version: GCE Virtual Firmware v1"},
			1: {`boot option 0002: Red Hat Enterprise Linux, \EFI\redhat\shimx64.efi`},
			4: {`boot loader or kernel \EFI\redhat\shimx64.efi [digest 40d6cae02973789080cf4c3a9ad11b5a0a4d8bba4438ab96e276cc784454dee7]`,
				`boot loader or kernel \EFI\redhat\grubx64.efi [digest e8a268c431da72caaae407f729f602b9dbf5d1d43492d4a51cc2b688a08586e3]`},
			7: {"Secure Boot: on", "owner's key of Secure Boot (PK): 1 certificates (Google Compute Engine's default PK), 0 images",
				"keys and images that Secure Boot forbids (dbx): 3 certificates (Canonical's, revoked for BootHole; Cisco's, revoked for BootHole; Debian's, revoked for BootHole), 183 images",
				`allowed by Shim: "Red Hat Secure Boot CA 5", unknown, SHA-256 40175d4c7c5ab4bd…`},
			8: {"kernel command line: (hd0,gpt2)/boot/vmlinuz-4.18.0-240.22.1.el8_3.x86_64 root=UUID=f3948fb4-cce7-4193-940a-c50052e93bf3 ro net.ifnames=0 biosdevname=0 scsi_mod.use_blk_mq=Y crashkernel=auto console=ttyS0,38400n8"},
			9: {"named by the boot loader: grub_linuxefi Kernel [digest 9f2a35ee745e32584d9671d0098f523f4264ff41ad0cfc620b254bc2f5b256a4]"},
		}},
		{"arch-linux-workstation", map[int]string{
			0: "758b773d94feabf52ef5a4c00a7ad2c80d8d6e6d9d58756150be9bc973da9087", 2: "65dee4a48cde677aa89fa83c5c35e883fda658f743853e3ebad504ca6702f7c5",
			4: "925d453d3dfef4ac0c72c957402163d45fa95d05e6d53f047263a3a60b598325", 7: "3b4a4db44b7a872524055364e62e897ae678e0d47ab0809f65c3a4ed77f66ab9",
		}, false, map[int][]string{
			2: {"driver in an option ROM of a PCI device [digest 2de50158a70fa60bcb0eff4f8ad5d5a8d6e4a808bfbe5446b74464163191a8bf]"},
			4: {`boot loader or kernel \vmlinuz-linux-lts [digest 7b50cf89806cefff619a2266ae37e1f7e7f4c14212da9445dd7e51046e90ca88]`},
			5: {"partition table: 3 partitions, disk f9f4bb69-5418-46bb-9501-2d615a3edc79"},
			7: {"Secure Boot: off", "keys and images that Secure Boot forbids (dbx): 0 certificates, 77 images"},
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			quoted := policy.State{}
			for i, v := range test.quoted {
				quoted[i], _ = hex.DecodeString(v)
			}
			l, err := eventlog.Check(firmware(t, test.name).Encode(), quoted)
			if err != nil {
				t.Fatal(err)
			}
			for i := range quoted {
				if l.PCR(i).Verdict != eventlog.Replays {
					t.Errorf("PCR %d: %v", i, l.PCR(i).Verdict)
				}
			}
			l = read(t, firmware(t, test.name))
			if on, err := l.SecureBoot(); on != test.on || err != nil {
				t.Errorf("Secure Boot: %v, %v", on, err)
			}
			for i, want := range test.words {
				got := lines(l.PCR(i))
				for _, line := range want {
					if !slices.Contains(got, line) {
						t.Errorf("PCR %d lacks %q in\n%s", i, line, strings.Join(got, "\n"))
					}
				}
			}
			if p := l.PCR(16); p.Verdict != eventlog.Untouched {
				t.Errorf("PCR 16: %v", p.Verdict)
			}
		})
	}
}

// index finds the n-th measured event of a PCR.
func index(t testing.TB, l *testenv.EventLog, pcr uint32, n int) int {
	t.Helper()
	for i, e := range l.Events {
		if e.PCR == pcr && e.Type != testenv.EventNoAction {
			if n--; n < 0 {
				return i
			}
		}
	}
	t.Fatalf("too few events of PCR %d", pcr)
	return 0
}

func TestLyingLogs(t *testing.T) {
	honest := firmware(t, "rhel8-uefi")
	quoted := policy.State{}
	for _, i := range []int{0, 2, 4, 7, 8, 9} {
		quoted[i] = honest.PCRs()[i]
	}
	if _, err := eventlog.Check(honest.Encode(), quoted); err != nil {
		t.Fatalf("control: %v", err)
	}
	for name, lie := range map[string]struct {
		tell func(l *testenv.EventLog)
		want string
	}{
		"an altered digest": {func(l *testenv.EventLog) { l.Events[index(t, l, 4, 2)].SHA256[0] ^= 1 }, "PCRs [4]"},
		"a dropped event": {func(l *testenv.EventLog) {
			i := index(t, l, 4, 2)
			l.Events = slices.Delete(l.Events, i, i+1)
		}, "PCRs [4]"},
		"all events of a PCR dropped": {func(l *testenv.EventLog) {
			l.Events = slices.DeleteFunc(l.Events, func(e testenv.LogEvent) bool { return e.PCR == 4 })
		}, "PCRs [4]"},
		"an added event":          {func(l *testenv.EventLog) { l.Events = append(l.Events, l.Events[index(t, l, 9, 0)]) }, "PCRs [9]"},
		"an event of another PCR": {func(l *testenv.EventLog) { l.Events[index(t, l, 8, 3)].PCR = 9 }, "PCRs [8 9]"},
		"reordered": {func(l *testenv.EventLog) {
			i, j := index(t, l, 4, 2), index(t, l, 4, 3)
			l.Events[i], l.Events[j] = l.Events[j], l.Events[i]
		}, "PCRs [4]"},
		"hidden as not measured": {func(l *testenv.EventLog) { l.Events[index(t, l, 4, 3)].Type = testenv.EventNoAction }, "PCRs [4]"},
		"another machine's":      {func(l *testenv.EventLog) { *l = *firmware(t, "arch-linux-workstation") }, "does not replay"},
		"no events":              {func(l *testenv.EventLog) { l.Events = nil }, "does not replay"},
	} {
		l := firmware(t, "rhel8-uefi")
		for i := range l.Events { // the lies must not change the honest log
			l.Events[i].SHA256 = bytes.Clone(l.Events[i].SHA256)
		}
		lie.tell(l)
		if _, err := eventlog.Check(l.Encode(), quoted); err == nil || !strings.Contains(err.Error(), lie.want) {
			t.Errorf("%s: got %v, want %q", name, err, lie.want)
		}
	}
	raw := honest.Encode()
	untouched := policy.State{4: make([]byte, 32), 7: make([]byte, 32)}
	none := *honest
	none.Events = nil
	for name, test := range map[string]struct {
		raw    []byte
		pcrs   policy.State
		wanted string
	}{
		"an empty log":                  {nil, quoted, "empty"},
		"an empty log, PCRs as reset":   {nil, untouched, "empty"},
		"a log of no event, PCRs reset": {none.Encode(), untouched, "says nothing"},
		"no PCRs":                       {raw, nil, "says nothing"},
		"a short value":                 {raw, policy.State{4: make([]byte, 20)}, "20 bytes"},
		"too large":                     {append(raw, make([]byte, policy.MaxEventLog)...), quoted, "at most"},
		"garbage":                       {bytes.Repeat([]byte("garbage "), 100), quoted, "event log"},
		"of TPM 1.2, with SHA-1 only":   {append(make([]byte, 28), 2, 0, 0, 0, 'h', 'i'), quoted, "no SHA-256"},
	} {
		if _, err := eventlog.Check(test.raw, test.pcrs); err == nil || !strings.Contains(err.Error(), test.wanted) {
			t.Errorf("%s: got %v, want %q", name, err, test.wanted)
		}
	}
	for n := range raw[:len(raw)-1] {
		if n%13 == 0 {
			if _, err := eventlog.Check(raw[:n], quoted); err == nil {
				t.Errorf("%d of %d bytes were taken", n, len(raw))
			}
		}
	}
}

// What the firmware's words may not do.
func TestHostileWords(t *testing.T) {
	l := firmware(t, "rhel8-uefi")
	measure := func(pcr, kind uint32, data []byte) {
		d := sha256.Sum256(data)
		e := l.Events[index(t, l, 8, 0)]
		e.PCR, e.Type, e.SHA256, e.Data = pcr, kind, d[:], data
		l.Events = append(l.Events, e)
	}
	measure(8, 0xd, []byte("\x1b[2J\u202ebad\nPCR 4 is fine\x00"))
	measure(8, 0xd, []byte(strings.Repeat("long ", 1000)))
	measure(4, 0x80000003, l.Events[index(t, l, 4, 2)].Data) // a path in the place of an image
	measure(6, 0x99999999, []byte("a type of tomorrow"))
	got := read(t, l)
	shown := lines(got.PCR(8))
	if want := "text of the boot loader: .[2J.bad.PCR 4 is fine"; !slices.Contains(shown, want) {
		t.Errorf("%q is not in %q", want, shown)
	}
	if last := shown[len(shown)-1]; len(last) > 1200 || !strings.HasSuffix(last, "bytes more") {
		t.Errorf("%d bytes: %q", len(last), last)
	}
	if want := "event of type 0x99999999: a type of tomorrow"; !slices.Contains(lines(got.PCR(6)), want) {
		t.Errorf("%q is not in %q", want, lines(got.PCR(6)))
	}
	if last := got.PCR(4).Events[5]; last.Measured || !strings.Contains(last.String(), "shimx64.efi [digest ") {
		t.Errorf("a path for an image: %q", last)
	}
	// The name of a file is nobody's word but the log's.
	named := l.Events[index(t, l, 4, 2)]
	copy(named.Data[bytes.Index(named.Data, []byte("s\x00h\x00i\x00m")):], "g\x00o\x00o\x00d")
	if p := read(t, l).PCR(4); p.Verdict != eventlog.Replays || p.Events[2].Measured || !strings.Contains(p.Events[2].String(), `goodx64.efi [digest 40d6`) {
		t.Errorf("a renamed file: %v %q", p.Verdict, p.Events[2])
	}
}

// Logs that replay and lie about Secure Boot.
func TestSecureBootLies(t *testing.T) {
	variable := func(name string, value []byte) []byte {
		b := make([]byte, 16) // any GUID
		b = binary.LittleEndian.AppendUint64(b, uint64(len(name)))
		b = binary.LittleEndian.AppendUint64(b, uint64(len(value)))
		for _, c := range []byte(name) {
			b = append(b, c, 0)
		}
		return append(b, value...)
	}
	list := func(size, each uint32) []byte { // an EFI_SIGNATURE_LIST of certificates
		b := []byte{0xa1, 0x59, 0xc0, 0xa5, 0xe4, 0x94, 0xa7, 0x4a, 0x87, 0xb5, 0xab, 0x15, 0x5c, 0x2b, 0xf0, 0x72}
		for _, n := range []uint32{size, 0, each} {
			b = binary.LittleEndian.AppendUint32(b, n)
		}
		return append(b, make([]byte, 100)...)
	}
	for name, test := range map[string]struct {
		kind uint32
		data []byte
		want string
	}{
		"measured later by the system": {0x80000001, variable("SecureBoot", []byte{1}), "duplicate"},
		"of a type of tomorrow":        {0x99999999, []byte("x"), "unknown type"},
		"a list of 4 GiB entries":      {0x80000001, variable("dbx", list(128, 0xfffffff0)), "malformed"},
		"a list of negative entries":   {0x80000001, variable("dbx", list(128, 1)), "malformed"},
		"a list longer than its value": {0x80000001, variable("db", list(1<<20, 100)), "malformed"},
	} {
		l := firmware(t, "arch-linux-workstation")
		d := sha256.Sum256(test.data)
		e := l.Events[index(t, l, 7, 0)]
		e.Type, e.SHA256, e.Data = test.kind, d[:], test.data
		l.Events = append(l.Events, e)
		if _, err := read(t, l).SecureBoot(); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: got %v, want %q", name, err, test.want)
		}
	}
	l := firmware(t, "rhel8-uefi")
	l.Events = slices.DeleteFunc(l.Events, func(e testenv.LogEvent) bool { return e.PCR == 7 })
	if _, err := read(t, l).SecureBoot(); err == nil {
		t.Error("Secure Boot is told without a word of it")
	}
	l = firmware(t, "rhel8-uefi")
	pcrs := policy.State(l.PCRs())
	pcrs[7] = pcrs[4]
	got, err := eventlog.Read(l.Encode(), pcrs)
	if err != nil || got.PCR(7).Verdict != eventlog.Differs || got.PCR(4).Verdict != eventlog.Replays {
		t.Fatalf("%v, %v", got, err)
	}
	if _, err := got.SecureBoot(); err == nil {
		t.Error("Secure Boot is told by a log that does not replay")
	}
}

func TestDiff(t *testing.T) {
	before := firmware(t, "rhel8-uefi")
	for name, test := range map[string]struct {
		pcr    int
		change func(l *testenv.EventLog)
		want   []string
	}{
		"nothing": {4, func(l *testenv.EventLog) {}, nil},
		"another GRUB": {4, func(l *testenv.EventLog) {
			if err := l.Replace(4, "grubx64.efi"); err != nil {
				t.Fatal(err)
			}
		}, []string{`boot loader or kernel \EFI\redhat\grubx64.efi changed from digest e8a268c431da72caaae407f729f602b9dbf5d1d43492d4a51cc2b688a08586e3 to `}},
		"Secure Boot off": {7, func(l *testenv.EventLog) {
			i := index(t, l, 7, 0)
			data := bytes.Clone(l.Events[i].Data)
			data[len(data)-1] = 0
			d := sha256.Sum256(data)
			l.Events[i].Data, l.Events[i].SHA256 = data, d[:]
		}, []string{`Secure Boot changed from "on" to "off"`}},
		"another order": {9, func(l *testenv.EventLog) {
			i, j := index(t, l, 9, 0), index(t, l, 9, 1)
			l.Events[i], l.Events[j] = l.Events[j], l.Events[i]
		}, []string{"the same events in another order"}},
		"one less": {8, func(l *testenv.EventLog) { i := index(t, l, 8, 0); l.Events = slices.Delete(l.Events, i, i+1) },
			[]string{"no more: GRUB command: set pager=1"}},
		"two commands become three": {8, func(l *testenv.EventLog) {
			for n := range 3 {
				e := l.Events[index(t, l, 8, 0)]
				e.Data = fmt.Appendf(nil, "grub_cmd: insmod %d", n)
				d := sha256.Sum256(e.Data[len("grub_cmd: "):])
				e.SHA256 = d[:]
				l.Events = append(l.Events, e)
			}
			for range 2 {
				i := index(t, l, 8, 0)
				l.Events = slices.Delete(l.Events, i, i+1)
			}
		}, []string{`GRUB command changed from "set pager=1" to "insmod 0"`,
			`GRUB command changed from "[ -f (hd0,gpt1)/EFI/redhat/grubenv ]" to "insmod 1"`, "new: GRUB command: insmod 2"}},
		"one more": {8, func(l *testenv.EventLog) { l.Events = append(l.Events, l.Events[index(t, l, 8, 0)]) },
			[]string{"new: GRUB command: set pager=1"}},
	} {
		after := firmware(t, "rhel8-uefi")
		test.change(after)
		got := eventlog.Diff(read(t, before).PCR(test.pcr), read(t, after).PCR(test.pcr))
		if name == "another GRUB" {
			i := index(t, after, 4, 3)
			test.want[0] += hex.EncodeToString(after.Events[i].SHA256)
		}
		if !slices.Equal(got, test.want) {
			t.Errorf("%s: got %q, want %q", name, got, test.want)
		}
	}
}

// Nothing panics at logs with a few bytes changed, cut out or overwritten.
func TestMutatedLogs(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	pcrs, taken := firmware(t, "rhel8-uefi").PCRs(), 0
	for n := range 1000 {
		raw := firmware(t, []string{"rhel8-uefi", "arch-linux-workstation"}[n%2]).Encode()
		for range 1 + r.IntN(5) {
			i := r.IntN(len(raw))
			switch r.IntN(3) {
			case 0:
				raw[i] = byte(r.Uint32())
			case 1:
				copy(raw[i:], "\xff\xff\xff\xff")
			case 2:
				raw = slices.Delete(raw, i, min(i+r.IntN(100), len(raw)))
			}
		}
		l, err := eventlog.Read(raw, pcrs)
		if err != nil {
			continue
		}
		taken++
		l.SecureBoot()
		for i := range l.PCRs {
			lines(&l.PCRs[i])
			eventlog.Diff(&l.PCRs[0], &l.PCRs[i])
		}
	}
	if taken < 100 {
		t.Errorf("only %d logs were read: the mutations are too coarse to say anything", taken)
	}
}

// FuzzRead: nothing panics, and what is shown is printable.
func FuzzRead(f *testing.F) {
	arch := firmware(f, "arch-linux-workstation")
	f.Add(arch.Encode())
	f.Add(firmware(f, "rhel8-uefi").Encode())
	f.Fuzz(func(t *testing.T, raw []byte) {
		l, err := eventlog.Read(raw, arch.PCRs())
		if err != nil {
			return
		}
		l.SecureBoot()
		for i := range l.PCRs {
			for _, line := range lines(&l.PCRs[i]) {
				if strings.ContainsAny(line, "\n\x1b\x00") {
					t.Fatalf("%q", line)
				}
			}
			eventlog.Diff(&l.PCRs[0], &l.PCRs[i])
		}
	})
}
